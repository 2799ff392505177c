"""The convolution that keeps an image's size, its transpose, and its two weight gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def flip(kernel: Tensor, groups: int = 1) -> Tensor:
    """The kernel of the transposed convolution: T(flip(k)) = T(k)' (SNF 26).

    Input and output channels swap within each group, and both axes of space are mirrored.
    """
    out, per_group, height, width = kernel.shape
    grouped = kernel.view(groups, out // groups, per_group, height, width)
    return grouped.transpose(1, 2).flip(3, 4).reshape(kernel.shape)


def _needed(dilation: int, x: Tensor, circular: bool) -> int:
    """A dilation that comes to the same on x, and pads it no further than it has to."""
    if dilation == 1 or torch.compiler.is_compiling():  # sizes that are unknown stay so
        return dilation
    height, width = x.shape[2:]
    if not circular:
        return min(dilation, max(height, width))
    return (dilation - 1) % math.lcm(height, width) + 1


def _pad(x: Tensor, kernel: Tensor, dilation: int, circular: bool) -> Tensor:
    rows, columns = kernel.shape[2] // 2 * dilation, kernel.shape[3] // 2 * dilation
    if not circular:
        return F.pad(x, (columns, columns, rows, rows))
    # By index rather than F.pad, which refuses a halo wider than the image.
    height, width = x.shape[2:]
    row = torch.arange(-rows, height + rows, device=x.device) % height
    column = torch.arange(-columns, width + columns, device=x.device) % width
    return x[:, :, row[:, None], column]


def convolve(x: Tensor, kernel: Tensor, dilation: int, groups: int, circular: bool) -> Tensor:
    """``k * x`` of the size of x: ``T(k) vec(x)``."""
    dilation = _needed(dilation, x, circular)
    return F.conv2d(_pad(x, kernel, dilation, circular), kernel, dilation=dilation, groups=groups)


def weight_gradient(
    delta: Tensor, x: Tensor, kernel: Tensor, dilation: int, groups: int, circular: bool
) -> Tensor:
    """Gradient of ``<delta, k * x>`` in k, of the shape of ``kernel``."""
    dilation = _needed(dilation, x, circular)
    padded = _pad(x, kernel, dilation, circular)
    return conv2d_weight(padded, kernel.shape, delta, dilation=dilation, groups=groups)


def inverse_term(
    other: Tensor, own: Tensor, size: torch.Size, dilation: int, groups: int, circular: bool
) -> Tensor:
    """``flip(other) * m(own)``, cropped or zero-padded to the shape of ``own`` (SNF 21-30)."""
    out, per_group = own.shape[:2]
    rows, columns = (
        _matches(own.shape[axis], other.shape[axis], extent, dilation, circular, own.device)
        for axis, extent in zip((2, 3), size, strict=True)
    )
    grouped = other.view(groups, out // groups, per_group, *other.shape[2:])
    term = torch.einsum("ac,goicd,bd->gioab", rows.to(own.dtype), grouped, columns.to(own.dtype))
    return term.reshape(own.shape)


def _matches(
    own: int, other: int, extent: int, dilation: int, circular: bool, device: torch.device
) -> Tensor:
    """How often tap a of one kernel meets tap c of the other in transposed place, ``(own, other)``.

    Along one axis, at offset ``s`` from the centre, a tap stands ``extent - |s|`` times in the
    layer's matrix (``extent`` times if circular), and only the tap at ``-s`` meets it. On an image
    smaller than the kernel, circular taps whose offsets differ by ``extent`` stand in one place.
    """
    # Made on the device: a copy from the CPU would wait for it.
    offset = (torch.arange(own, device=device)[:, None] - own // 2) * dilation
    total = offset + (torch.arange(other, device=device) - other // 2) * dilation
    if circular:
        return extent * (total % extent == 0)
    return (extent - offset.abs()).clamp(min=0) * (total == 0)
