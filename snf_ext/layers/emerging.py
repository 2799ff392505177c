"""Emerging convolutions: two triangular convolutions, one each way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import func_transforms, ops
from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from ..own_parameters import assign_
from ..reference.triangular import anchor, triangular_conv2d, triangular_mask
from .conv_shape import ConvShape, image_size
from .glow_mixing import PlainConv1x1


class EmergingConv2d(Bijection):
    """``z = u * (l * (Q x)) + c``: a 1x1 convolution and two masked ones, one each way.

    The kernels l and u cover opposite quadrants of a ``k x k`` kernel, and half of the centre's
    C x C: with pixels in raster order and the channel fastest the matrix of l is lower triangular
    and that of u upper triangular. Together they see the whole ``k x k`` window.

    Shapes: x ``(B, C, H, W)``, z the same, ``log_det`` and ``recon`` (zeros) ``(B,)``.

    Args:
        channels: C.
        kernel_size: k; odd, or a pair.
        bias: whether there is a c.

    Parameters: ``pointwise.weight`` Q ``(C, C)``, started at a random orthogonal matrix;
    ``lower`` l and ``upper`` u of ``(C, C, (k+1)/2, (k+1)/2)``, of which only the triangle that
    counts is read, started at the identity plus Xavier-normal noise of gain 0.01; ``bias`` c
    ``(C,)``, started at 0, or None.

    Raises:
        ValueError: an even kernel.

    Cost: O(B H W C^2 (k+1)^2 / 2 + C^3) a step; the inverse is a substitution of as many
    operations, of which ``H + W - 1`` steps follow each other. Source: Hoogeboom et al. 2019,
    "Emerging convolutions for generative normalizing flows".

    >>> layer = EmergingConv2d(2)
    >>> x = torch.randn(3, 2, 4, 5)
    >>> torch.allclose(layer.inverse(layer(x).z), x, atol=1e-4)
    True
    """

    mixing = True

    def __init__(
        self, channels: int, kernel_size: int | tuple[int, int] = 3, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.shape = ConvShape.checked(channels, kernel_size, 1, 1, "zeros", 1)
        self.pointwise = PlainConv1x1(channels, bias=False)
        rows, columns = (extent // 2 + 1 for extent in self.shape.kernel_size)
        self.lower = nn.Parameter(torch.empty(channels, channels, rows, columns))
        self.upper = nn.Parameter(torch.empty(channels, channels, rows, columns))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: l and u near the identity, c = 0; Q is another module's."""
        for kernel, upper in ((self.lower, False), (self.upper, True)):
            assign_(kernel, _start(kernel.shape, upper))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self.shape.check_image(x, "x")
        z = self.pointwise(x).z
        z = triangular_conv2d(z, triangular_mask(self.lower, False))
        z = triangular_conv2d(z, triangular_mask(self.upper, True), upper=True)
        if self.bias is not None:
            z = z + self.bias[:, None, None]
        zeros = per_sample_zeros(x)
        return FlowStep(z, zeros + self.log_abs_det((x.shape[2], x.shape[3])), zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """The solution of the three systems in turn, exact in either case.

        Raises:
            ValueError: z is not ``(B, C, H, W)``, or one of the three is singular.
        """
        self.shape.check_image(z, "z")
        traced = (
            torch.compiler.is_compiling() or func_transforms.active()
        )  # without values to look at
        if not traced and not (self._diagonal() != 0).all():
            raise ValueError("weight is singular: the layer has no inverse")
        y = z if self.bias is None else z - self.bias[:, None, None]
        y = ops.triangular_conv2d_solve(y, self.upper.to(y.dtype), upper=True)
        y = ops.triangular_conv2d_solve(y, self.lower.to(y.dtype))
        return self.pointwise.inverse(y)

    def log_abs_det(self, spatial_shape: tuple[int, int]) -> Tensor:
        """``log |det|`` in nats on ``(H, W)`` images, a scalar with its exact gradient."""
        height, width = image_size(spatial_shape)
        diagonals = self._diagonal().abs().log().sum()
        return self.pointwise.log_abs_det((height, width)) + height * width * diagonals

    def _diagonal(self) -> Tensor:
        both = torch.cat([anchor(self.lower, False), anchor(self.upper, True)], 1)
        channels = self.shape.channels
        pair = both.unflatten(1, (2, channels)).diagonal(dim1=0, dim2=2)
        return pair.to(wide_dtype(pair.dtype))

    def extra_repr(self) -> str:
        kernel_size = self.shape.kernel_size
        return f"{self.shape.channels}, kernel_size={kernel_size}, bias={self.bias is not None}"


def _start(shape: torch.Size, upper: bool) -> Tensor:
    kernel = nn.init.xavier_normal_(torch.empty(shape), gain=0.01)
    anchor(kernel, upper).add_(torch.eye(shape[0]))
    return kernel
