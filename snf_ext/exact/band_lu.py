"""LU of a convolution's matrix as a band, with LAPACK's pivoting: for weak pivots of the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .block_matrix import sum_over_places

# Columns of the inverse that are computed at a time.
_CHUNK = 256


class BandLU:
    """LAPACK's ``gbtrf`` of the matrix of one zero-padded convolution in float64 on the CPU.

    With pixels in raster order and the channel fastest, the matrix has the half-bandwidth
    ``b = ry w c + rx c + c - 1`` for a kernel that reaches ry rows and rx columns.

    Args:
        kernel: ``(c, c, kh, kw)``.
        size: ``(h, w)`` of the image.

    Cost: ``4 D b^2`` operations and ``(3 b + 1) D`` numbers, ``D = h w c``.

    >>> kernel = torch.tensor([1.0, 0.0, 1.0]).double().reshape(1, 1, 3, 1)  # no pivot is not 0
    >>> lu = BandLU(kernel, (2, 1))
    >>> lu.log_abs_det.item(), lu.solve(torch.tensor([[3.0], [4.0]]).double()).tolist()
    (0.0, [[4.0], [3.0]])
    """

    def __init__(self, kernel: Tensor, size: tuple[int, int]) -> None:
        self._kernel, self._size = kernel.detach(), size
        band = band_matrix(kernel.detach().numpy(), size)
        self._half = (len(band) - 1) // 3
        self._lu, self._pivots, _ = _lapack().dgbtrf(band, self._half, self._half, overwrite_ab=1)
        with np.errstate(divide="ignore"):
            diagonal = np.log(np.abs(self._lu[2 * self._half]))
        self.log_abs_det = torch.tensor(diagonal.sum(), dtype=torch.float64)
        """``log |det T|`` in nats, a scalar; -inf if T is singular."""

    def solve(self, rhs: Tensor) -> Tensor:
        """``x`` with ``T x = rhs``, shapes ``(h w c, N)``; differentiable in rhs."""
        return _Solve.apply(rhs, self)

    def substitute(self, rhs: Tensor, transposed: bool = False) -> Tensor:
        """As :meth:`solve`, also for the transposed matrix, without a gradient."""
        half, columns = self._half, np.array(rhs.detach().double().cpu().numpy(), order="F")
        if columns.size == 0:
            return rhs.clone()
        lapack = _lapack()
        x, _ = lapack.dgbtrs(
            self._lu, half, half, columns, self._pivots, trans=int(transposed), overwrite_b=1
        )
        return torch.from_numpy(x).to(rhs)

    def gradient(self) -> Tensor:
        """The gradient of ``log |det T|`` with respect to the kernel, ``(c, c, kh, kw)``.

        From the columns of the inverse, a few at a time. Cost: ``6 D^2 b`` operations.
        """
        channels, _, tall, _ = self._kernel.shape
        height, width = self._size
        row, reach = width * channels, tall // 2
        total = torch.zeros(self._kernel.shape, dtype=torch.float64)[None]
        rows = max(1, _CHUNK // row, reach)
        size = rows * row
        for top in range(0, height, rows):
            columns = min(rows, height - top) * row
            unit = torch.zeros(height * row, columns, dtype=torch.float64)
            unit[top * row : top * row + columns] = torch.eye(columns, dtype=torch.float64)
            inverse = self.substitute(unit).T  # transposed: rows are what T's outputs are
            blocks = inverse.new_zeros(1, size, 3 * size)
            first, last = max(0, top - rows), min(height, top + 2 * rows)
            place = (first - top + rows) * row
            near = inverse[:, first * row : last * row]
            blocks[0, :columns, place : place + near.shape[1]] = near
            total += sum_over_places(blocks, total.shape, width, rows)
        return total[0]


class BandLUs:
    """One :class:`BandLU` for each group, with the methods of a :class:`BlockLU`."""

    def __init__(self, kernels: Tensor, size: tuple[int, int]) -> None:
        self._groups = [BandLU(kernel, size) for kernel in kernels]
        self.log_abs_det = torch.stack([lu.log_abs_det for lu in self._groups])

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.stack([lu.solve(b) for lu, b in zip(self._groups, rhs, strict=True)])

    def gradient(self) -> Tensor:
        return torch.stack([lu.gradient() for lu in self._groups])

    def move(self, device: torch.device) -> None:
        """LAPACK stays where it is; tensors of other devices come and go."""


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rhs: Tensor, lu: BandLU) -> Tensor:
        ctx.lu = lu
        return lu.substitute(rhs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.lu.substitute(grad, transposed=True), None


def band_matrix(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The band as ``gbtrf`` takes it, ``(3 b + 1, D)``: ``[2 b + i - j, j] = T[i, j]``."""
    channels, _, tall, wide = kernel.shape
    height, width = size
    half = half_bandwidth(channels, tall, wide, size)
    band = np.zeros((3 * half + 1, height * width * channels), order="F")
    out, into = np.arange(channels)[:, None], np.arange(channels)
    for a in range(tall):
        for b in range(wide):
            down, right = a - tall // 2, b - wide // 2
            rows = np.arange(max(0, down), min(height, height + down))
            columns = np.arange(max(0, right), min(width, width + right))
            pixels = (rows[:, None] * width + columns).ravel()[:, None, None]
            offset = (down * width + right) * channels + into - out
            band[2 * half - offset, pixels * channels + into] = kernel[:, :, a, b]
    return band


def half_bandwidth(channels: int, tall: int, wide: int, size: tuple[int, int]) -> int:
    """How far from the diagonal an element may stand: ``ry w c + rx c + c - 1``."""
    height, width = size
    half = ((tall // 2) * width + wide // 2) * channels + channels - 1
    return min(half, height * width * channels - 1)


def _lapack() -> Any:
    import scipy.linalg.lapack  # on use: most programs never need it

    return scipy.linalg.lapack
