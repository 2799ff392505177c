"""The blocks of a convolution's matrix, gathered from its kernel, and back.

With pixels in raster order and the channel fastest, the matrix of a zero-padded convolution is
block tridiagonal and Toeplitz: one or several image rows make a block of m rows, and the blocks
L, D, U before, on and after the diagonal are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import kept

# Indices of larger blocks are made anew: their cost disappears beside the arithmetic.
_KEPT = 128


def block_matrices(kernels: Tensor, width: int, rows: int) -> Tensor:
    """``[L | D | U]`` of each group, ``(G, m, 3 m)`` with ``m = rows * width * c``.

    Args:
        kernels: ``(G, c, c, kh, kw)``; ``kh // 2`` at most ``rows``.
        width: of the image.
        rows: image rows in a block.

    >>> block_matrices(torch.tensor([[[[[1.0], [2.0], [3.0]]]]]), width=1, rows=1)
    tensor([[[1., 2., 3.]]])
    """
    index = _index(kernels.shape, width, rows).to(kernels.device)
    with_zero = torch.nn.functional.pad(kernels.flatten(1), (0, 1))
    return with_zero[:, index]


def diagonal_block(kernels: Tensor, width: int, rows: int) -> Tensor:
    """D alone, ``(G, m, m)``: the whole matrix if ``rows`` are all of the image's."""
    index = _index(kernels.shape, width, rows, (0,)).to(kernels.device)
    return torch.nn.functional.pad(kernels.flatten(1), (0, 1))[:, index]


def sum_over_places(blocks: Tensor, shape: torch.Size, width: int, rows: int) -> Tensor:
    """The adjoint of :func:`block_matrices`: each tap's sum over its places, of ``shape``."""
    index = _index(shape, width, rows).to(blocks.device).flatten()
    taps = shape[1:].numel()
    sums = blocks.new_zeros(shape[0], taps + 1).index_add_(1, index, blocks.flatten(1))
    return sums[:, :taps].reshape(shape)


def _index(
    shape: torch.Size, width: int, rows: int, blocks: tuple[int, ...] = (-1, 0, 1)
) -> Tensor:
    """Which tap stands where in ``[L | D | U]``; the number of taps where none does."""
    channels, tall, wide = shape[2:]
    make = _kept_index if rows * width * channels <= _KEPT else _make_index
    return make(channels, tall, wide, width, rows, blocks)


def _make_index(
    channels: int, tall: int, wide: int, width: int, rows: int, blocks: tuple[int, ...]
) -> Tensor:
    row, column = torch.arange(rows), torch.arange(width)
    out, into = torch.arange(channels), torch.arange(channels)
    # Axes: row, column, channel of the output; block, row, column, channel of the input.
    down = (row + rows * torch.tensor(blocks)[:, None])[None, :, :] - row[:, None, None]
    down = down[:, None, None, :, :, None, None] + tall // 2
    right = (column - column[:, None])[None, :, None, None, None, :, None] + wide // 2
    pair = out[:, None, None, None, None] * channels + into
    taps = channels * channels * tall * wide
    inside = (down >= 0) & (down < tall) & (right >= 0) & (right < wide)
    index = torch.where(inside, (pair * tall + down) * wide + right, taps)
    size = rows * width * channels
    return index.reshape(size, len(blocks) * size)


_kept_index = kept(_make_index)
