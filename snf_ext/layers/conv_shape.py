"""What the convolution layers share: the shape of their kernels, and how it is checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..exact import Plan, plan_conv2d


class ConvShape(NamedTuple):
    """Channels, kernel size, dilation, groups and padding of a convolution that keeps the size."""

    channels: int
    kernel_size: tuple[int, int]
    dilation: int
    groups: int
    padding_mode: str

    @classmethod
    def checked(
        cls,
        channels: int,
        kernel_size: int | tuple[int, int],
        dilation: int,
        groups: int,
        padding_mode: str,
        stride: int,
    ) -> ConvShape:
        """The shape, or ValueError / NotImplementedError naming the argument and the way out."""
        if channels < 1:
            raise ValueError(f"channels must be at least 1; got {channels}")
        if not 1 <= dilation < 2**31:
            raise ValueError(f"dilation must be in [1, 2^31); got {dilation}")
        if groups < 1 or channels % groups != 0:
            raise ValueError(f"groups must divide the channels C = {channels}; got {groups}")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode must be 'zeros' or 'circular'; got {padding_mode!r}")
        if stride != 1:
            raise NotImplementedError(
                f"stride must be 1, so that the layer is invertible; got {stride}. "
                "Use Squeeze to change the resolution"
            )
        size = odd_pair(kernel_size, "kernel_size")
        return cls(channels, size, dilation, groups, padding_mode)

    @property
    def circular(self) -> bool:
        return self.padding_mode == "circular"

    @property
    def geometry(self) -> tuple[int, int, bool]:
        """``(dilation, groups, circular)``, as the operators take them."""
        return self.dilation, self.groups, self.circular

    def weight_shape(self, kernel_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        return (self.channels, self.channels // self.groups, *(kernel_size or self.kernel_size))

    def exact_plan(self, spatial_shape: tuple[int, int]) -> Plan:
        """What exact values on ``(H, W)`` images take."""
        return plan_conv2d(self.weight_shape(), image_size(spatial_shape), *self.geometry)

    def check_image(self, x: Tensor, name: str) -> None:
        """Raise ValueError unless ``x`` is ``(B, C, H, W)``."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{name} must have shape [B, C, H, W] with C = {self.channels}; got {list(x.shape)}"
            )

    def __str__(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"groups={self.groups}, padding_mode={self.padding_mode!r}"
        )


def odd_pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """``size`` as (height, width), both odd and positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(extent < 1 or extent % 2 == 0 for extent in pair):
        raise ValueError(
            f"{name} must be odd and positive, so that the shape is kept "
            f"(Squeeze changes the resolution); got {size}"
        )
    return pair[0], pair[1]


def image_size(spatial_shape: tuple[int, int]) -> tuple[int, int]:
    """``spatial_shape`` as two positive ints, or ValueError."""
    size = tuple(int(extent) for extent in spatial_shape)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"spatial_shape must be (H, W), both positive; got {spatial_shape}")
    return size[0], size[1]
