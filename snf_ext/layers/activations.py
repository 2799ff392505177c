"""Element-wise activations with an inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_sum, per_sample_zeros, wide_dtype


class SmoothLeakyReLU(Bijection):
    """``z = a x + (1 - a) log(1 + e^x)``, element by element: slope a on the left, 1 on the right.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, in (0, 1].

    Raises:
        ValueError: ``alpha`` is outside (0, 1].

    Source: Gresele et al. 2020, used by SNF A.3 with a = 0.3. The inverse is Newton's method,
    which on this convex function converges from the right without overshooting.

    >>> import torch
    >>> f = SmoothLeakyReLU(0.3)
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(f.inverse(f(x).z), x, atol=1e-5)
    True
    """

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1]; got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        z, log_det = ops.smooth_leaky_relu(x, self.alpha)
        return FlowStep(z, log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return self.inverse_with_iterations(z)[0]

    def inverse_with_iterations(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the most Newton iterations that an element took, an int64 scalar.

        >>> import torch
        >>> x, iterations = SmoothLeakyReLU(0.3).inverse_with_iterations(torch.zeros(1, 1))
        >>> round(x.item(), 3), iterations.item() < 10
        (-0.838, True)
        """
        x, _, iterations = ops.smooth_leaky_relu_inverse(z, self.alpha)
        return x, iterations

    def extra_repr(self) -> str:
        return f"{self.alpha}"


class LeakyReLU(Bijection):
    """``z = x`` where x > 0 and ``z = a x`` elsewhere, element by element.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, in (0, 1].

    Raises:
        ValueError: ``alpha`` is outside (0, 1].

    >>> LeakyReLU(0.5)(torch.tensor([[-2.0, 2.0]])).z.tolist()
    [[-1.0, 2.0]]
    """

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1]; got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        left = (x <= 0).to(wide_dtype(x.dtype))
        log_det = per_sample_sum(left) * math.log(self.alpha)
        return FlowStep(F.leaky_relu(x, self.alpha), log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return torch.where(z > 0, z, z / self.alpha)

    def extra_repr(self) -> str:
        return f"{self.alpha}"


class LearnableLeakyReLU(Bijection):
    """:class:`LeakyReLU` whose slope on the left is ``sigmoid(p) + 1/2``, in (0.5, 1.5).

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``. Parameter: ``p`` of ``(1,)``,
    started at 0, the identity. Source: SNF's public code.

    >>> f = LearnableLeakyReLU()
    >>> f(torch.tensor([[-2.0, 2.0]])).z.tolist()
    [[-2.0, 2.0]]
    """

    _version = 2  # version 1 had a scalar, which FSDP2 does not shard

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, at the identity."""
        self.p.zero_()

    def _migrate(self, state: dict[str, Any], prefix: str, version: int | None) -> None:
        p = state.get(prefix + "p")
        if p is not None and p.dim() == 0:
            state[prefix + "p"] = p.reshape(1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        wide = wide_dtype(x.dtype)
        slope = self._slope(wide)
        v = x.to(wide)
        log_det = per_sample_sum((v <= 0).to(wide)) * slope.log()
        return FlowStep(torch.where(v > 0, v, v * slope).to(x.dtype), log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        v = z.to(wide_dtype(z.dtype))
        return torch.where(v > 0, v, v / self._slope(v.dtype)).to(z.dtype)

    def _slope(self, dtype: torch.dtype) -> Tensor:
        return torch.sigmoid(self.p.to(dtype)) + 0.5


class SmoothTanh(Bijection):
    """``z = tanh(a x) + b x``, element by element.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, positive.
        beta: b, positive: the slope far out.

    Raises:
        ValueError: ``alpha`` or ``beta`` is not positive and finite.

    Cost of the inverse: always ``6 + log2(1 + a / b) / 2`` iterations of Newton's method, twice
    what it takes to converge, so that the device need not be asked.
    Source: SNF's public code.

    >>> f = SmoothTanh()
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(f.inverse(f(x).z), x, atol=1e-5)
    True
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.1) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}")
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        v = x.to(wide_dtype(x.dtype))
        log_det = per_sample_sum(self._slope(v).log())
        return FlowStep(self._value(v).to(x.dtype), log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        wide = z.to(wide_dtype(z.dtype))
        with torch.no_grad():
            # The map is odd. Right of 0 it is concave, so that Newton's method started left of
            # the root stays left of it and converges; the bracket guards against rounding.
            size = wide.abs()
            high = (size / self.beta).clamp(max=torch.finfo(wide.dtype).max)
            low = torch.maximum(size / (self.alpha + self.beta), (size - 1) / self.beta)
            low = torch.minimum(low, high)
            x = low
            for _ in range(6 + math.ceil(math.log2(1 + self.alpha / self.beta) / 2)):
                x = x - (self._value(x) - size) / self._slope(x)
                x = torch.minimum(torch.maximum(x, low), high)
            x = torch.copysign(x, wide)
        if wide.requires_grad:  # one more step carries the gradient dx/dz = 1 / f'(x)
            x = x - (self._value(x) - wide) / self._slope(x)
        return x.to(z.dtype)

    def _value(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) + self.beta * x

    def _slope(self, x: Tensor) -> Tensor:
        return self.alpha * (1 - torch.tanh(self.alpha * x).square()) + self.beta

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"
