"""The same layers without a learned inverse, trained by the exact log-determinant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import exact
from ..bijection import Bijection, FlowStep, per_sample_zeros
from ..own_parameters import assign_
from ..reference.convolution import convolve
from .conv_shape import ConvShape, image_size
from .initial import STARTS, checked_start
from .one_weight import OneWeight


class ExactLinear(OneWeight):
    """Linear map ``z = W x + c`` whose ``log |det W|`` is differentiated exactly.

    Shapes: x ``(..., D)``, z the same, ``log_det`` and ``recon`` (zeros) ``(...)``.

    Args:
        features: D.
        bias: whether there is a c.

    Cost: O(B D^2 + D^3) a training step; this is what :class:`SelfNormLinear` avoids.

    >>> layer = ExactLinear(4)
    >>> step = layer(torch.randn(3, 4))
    >>> torch.allclose(step.log_det, layer.log_abs_det().expand(3))
    True
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self._check(x, "x")
        z = F.linear(x, self.weight, self.bias)
        log_det = self.log_abs_det().expand(x.shape[:-1])
        return FlowStep(z, log_det, torch.zeros_like(log_det))

    def log_abs_det(self) -> Tensor:
        """``log |det W|`` in nats, a scalar with its exact gradient (cached without grad)."""
        if exact.differentiates(self.weight):
            return exact.linear_log_abs_det(self.weight)
        return super().log_abs_det()


class ExactConv2d(Bijection):
    """Convolution ``z = w * x + c`` whose log-determinant is differentiated exactly.

    Arguments and shapes as in :class:`SelfNormConv2d`, less the inverse's kernel.

    Cost: a convolution and about 2.2 times what :meth:`exact_plan` says, a training step: at most
    O(H (W C)^3) for 3x3 kernels, never O((C H W)^3).

    >>> layer = ExactConv2d(2, 3)
    >>> layer(torch.randn(3, 2, 4, 4)).log_det.shape
    torch.Size([3])
    """

    mixing = True

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        stride: int = 1,
        start: str = "identity",
    ) -> None:
        super().__init__()
        self.shape = ConvShape.checked(
            channels, kernel_size, dilation, groups, padding_mode, stride
        )
        self.start = checked_start(start)
        self.weight = nn.Parameter(torch.empty(self.shape.weight_shape()))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self._cache = exact.FactorizationCache()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: w near Dirac or orthogonal, c = 0."""
        assign_(self.weight, STARTS[self.start](self.weight.shape, self.shape.groups))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self.shape.check_image(x, "x")
        z = convolve(x, self.weight, *self.shape.geometry)
        if self.bias is not None:
            z = z + self.bias[:, None, None]
        log_det = self.log_abs_det((x.shape[2], x.shape[3])).expand(x.shape[0])
        return FlowStep(z, log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """The solution of ``w * x = z - c``, exact in either case."""
        self.shape.check_image(z, "z")
        y = z if self.bias is None else z - self.bias[:, None, None]
        factorization = self._factorization((z.shape[2], z.shape[3]))
        return factorization.solve(y.flatten(1)).reshape(z.shape)

    def log_abs_det(self, spatial_shape: tuple[int, int]) -> Tensor:
        """``log |det T(w)|`` in nats, a scalar with its exact gradient (cached without grad)."""
        size = image_size(spatial_shape)
        if exact.differentiates(self.weight):
            return exact.conv2d_log_abs_det(self.weight, size, *self.shape.geometry)
        return self._factorization(size).log_abs_det.to(self.weight)

    def _factorization(self, spatial_shape: tuple[int, int]) -> exact.Factorization:
        geometry = (*spatial_shape, *self.shape.geometry)
        return exact.factorized(self._cache, self.weight, geometry)

    def exact_plan(self, spatial_shape: tuple[int, int]) -> exact.Plan:
        """Operations and memory of exact values; see :meth:`SelfNormConv2d.exact_plan`."""
        return self.shape.exact_plan(spatial_shape)

    def extra_repr(self) -> str:
        return f"{self.shape}, bias={self.bias is not None}"
