"""The dense matrix of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor


def conv2d_matrix(
    weight: Tensor,
    spatial_shape: tuple[int, int],
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
) -> Tensor:
    """The matrix T(w) with ``vec(w * x) = T(w) vec(x)``, differentiable in w.

    Args:
        weight: w, ``(C, C/groups, kh, kw)`` with odd kh and kw.
        spatial_shape: ``(H, W)`` of the image.
        dilation, groups, circular: as in the convolution.

    Returns:
        ``(D, D)`` with ``D = C H W``, channels slowest (the order of ``x.flatten(1)``).

    Cost: D^2 numbers; use it for small images only.

    >>> conv2d_matrix(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 3))
    tensor([[2., 3., 0.],
            [1., 2., 3.],
            [0., 1., 2.]])
    """
    height, width = spatial_shape
    channels, per_group = weight.shape[:2]
    block = weight.new_zeros(channels, channels, *weight.shape[2:])
    for start in range(0, channels, per_group):
        group = slice(start, start + per_group)
        block[group, group] = weight[group]
    matrix = weight.new_zeros(height * width, height * width, channels, channels)
    for a in range(weight.shape[2]):
        for b in range(weight.shape[3]):
            out_row, in_row = _taps(height, (a - weight.shape[2] // 2) * dilation, circular)
            out_col, in_col = _taps(width, (b - weight.shape[3] // 2) * dilation, circular)
            out = (out_row[:, None] * width + out_col).flatten()
            into = (in_row[:, None] * width + in_col).flatten()
            matrix = matrix.index_put(
                (out.to(weight.device), into.to(weight.device)), block[:, :, a, b], accumulate=True
            )
    size = channels * height * width
    return matrix.permute(2, 0, 3, 1).reshape(size, size)


def _taps(extent: int, offset: int, circular: bool) -> tuple[Tensor, Tensor]:
    """Output and input positions along one axis that a tap at ``offset`` joins."""
    out = torch.arange(extent)
    if circular:
        return out, (out + offset) % extent
    inside = (out + offset >= 0) & (out + offset < extent)
    return out[inside], out[inside] + offset
