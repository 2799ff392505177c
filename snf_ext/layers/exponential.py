"""The exponential of a convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from ..own_parameters import assign_
from ..reference.autocast import without_autocast
from ..reference.convolution import convolve
from .conv_shape import ConvShape, image_size
from .glow_mixing import PlainConv1x1
from .spectral import spectral_norm_bound

LARGEST_BOUND = 5.0


class ExponentialConv2d(Bijection):
    """``z = exp(M) Q x + c``: a 1x1 convolution Q and the exponential of a convolution M.

    ``exp(M) y = sum_i M^i y / i!``, ``log |det exp(M)| = tr M = H W sum_c m[c, c, centre]`` and
    the inverse is ``exp(-M)``. M is the weight's convolution, scaled down where its spectral norm
    may exceed ``norm_bound``; see :func:`~snf_ext.layers.spectral.spectral_norm_bound`, which
    holds for every image size and keeps no state. The series ends where the rest is below the
    dtype's precision: after 9 terms in float32 and 17 in float64 at the bound of 0.9.

    Shapes: x ``(B, C, H, W)``, z the same, ``log_det`` and ``recon`` (zeros) ``(B,)``.

    Args:
        channels: C.
        kernel_size: k; odd, or a pair.
        bias: whether there is a c.
        norm_bound: in (0, 5]; larger ones lose ``exp(2 norm_bound)`` in precision.

    Parameters: ``pointwise.weight`` Q ``(C, C)``, started at a random orthogonal matrix;
    ``weight`` ``(C, C, k, k)``, started at standard normal noise divided by ``C k k``; ``bias`` c
    ``(C,)``, started at 0, or None.

    Raises:
        ValueError: an even kernel, a bound outside its interval.

    Cost: as many convolutions as terms, forward and inverse alike. Half precisions are summed in
    float32. Source: Hoogeboom et al. 2020, "The convolution exponential and generalized Sylvester
    flows".

    >>> layer = ExponentialConv2d(2)
    >>> x = torch.randn(3, 2, 4, 5)
    >>> torch.allclose(layer.inverse(layer(x).z), x, atol=1e-4)
    True
    """

    mixing = True

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        bias: bool = True,
        norm_bound: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 < norm_bound <= LARGEST_BOUND:
            raise ValueError(f"norm_bound must be in (0, {LARGEST_BOUND:g}]; got {norm_bound}")
        self.shape = ConvShape.checked(channels, kernel_size, 1, 1, "zeros", 1)
        self.norm_bound = norm_bound
        self.pointwise = PlainConv1x1(channels, bias=False)
        self.weight = nn.Parameter(torch.empty(self.shape.weight_shape()))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: the kernel at noise, c = 0; Q is another module's."""
        shape = self.weight.shape
        assign_(self.weight, torch.randn(shape) / math.prod(shape[1:]))
        if self.bias is not None:
            self.bias.zero_()

    def kernel(self) -> Tensor:
        """m, the kernel of M: the weight, scaled down to a norm of ``norm_bound`` at most."""
        with without_autocast(self.weight.device):
            bound = spectral_norm_bound(self.weight)
        return self.weight.to(bound.dtype) / (bound / self.norm_bound).clamp(min=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self.shape.check_image(x, "x")
        kernel = self.kernel()
        z = self._exponential(self.pointwise(x).z, kernel)
        if self.bias is not None:
            z = z + self.bias[:, None, None]
        zeros = per_sample_zeros(x)
        return FlowStep(z, zeros + self._log_abs_det(kernel, (x.shape[2], x.shape[3])), zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """``Q^-1 exp(-M) (z - c)``, exact in either case.

        Raises:
            ValueError: z is not ``(B, C, H, W)``, or Q is singular.
        """
        self.shape.check_image(z, "z")
        y = z if self.bias is None else z - self.bias[:, None, None]
        return self.pointwise.inverse(self._exponential(y, -self.kernel()))

    def log_abs_det(self, spatial_shape: tuple[int, int]) -> Tensor:
        """``log |det|`` in nats on ``(H, W)`` images, a scalar with its exact gradient."""
        return self._log_abs_det(self.kernel(), image_size(spatial_shape))

    def _log_abs_det(self, kernel: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = self.shape.kernel_size
        trace = kernel[:, :, rows // 2, columns // 2].trace()
        return self.pointwise.log_abs_det(size) + size[0] * size[1] * trace

    def _exponential(self, x: Tensor, kernel: Tensor) -> Tensor:
        term = total = x.to(wide_dtype(x.dtype))
        for i in range(1, series_terms(self.norm_bound, total.dtype) + 1):
            term = convolve(term, kernel.to(term.dtype), *self.shape.geometry) / i
            total = total + term
        return total.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.shape.channels}, kernel_size={self.shape.kernel_size}, "
            f"bias={self.bias is not None}, norm_bound={self.norm_bound}"
        )


def series_terms(norm: float, dtype: torch.dtype) -> int:
    """The n after which the rest of ``sum_i norm^i / i!`` is below the dtype's precision.

    >>> series_terms(0.9, torch.float32), series_terms(0.9, torch.float64)
    (9, 17)
    """
    # Forty terms of the rest are all of it, in double precision, up to the largest bound.
    terms = [norm**i / math.factorial(i) for i in range(80)]
    eps = torch.finfo(dtype).eps
    return next(n for n in range(40) if sum(terms[n + 1 : n + 41]) < eps)
