"""What linear layers without a learned inverse share: one weight, factorised when it is asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import exact
from ..bijection import Bijection
from ..own_parameters import assign_
from .initial import near_identity


class OneWeight(Bijection):
    """``z = W x + c`` with the exact inverse and log-determinant; the training step is open."""

    mixing = True

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1; got {features}")
        self.features = features
        self.weight = nn.Parameter(torch.empty(features, features))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        self._cache = exact.FactorizationCache()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: W near the identity, c = 0."""
        assign_(self.weight, near_identity(self.weight.shape))
        if self.bias is not None:
            self.bias.zero_()

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """The solution of ``W x = z - c``, exact in either case.

        Raises:
            ValueError: z has another last dimension, or W is singular.
        """
        self._check(z, "z")
        y = z if self.bias is None else z - self.bias
        return self._factorization().solve(y.reshape(-1, self.features)).reshape(z.shape)

    def log_abs_det(self) -> Tensor:
        """Exact ``log |det W|`` in nats, a scalar without gradient; -inf if W is singular."""
        return self._factorization().log_abs_det.to(self.weight)

    def _factorization(self) -> exact.Factorization:
        return exact.factorized(self._cache, self.weight)

    def _check(self, x: Tensor, name: str) -> None:
        if x.dim() < 1 or x.shape[-1] != self.features:
            raise ValueError(
                f"{name} must have shape [..., D] with D = {self.features}; got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"
