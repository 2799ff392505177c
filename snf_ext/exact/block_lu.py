"""LU of a convolution's matrix by blocks of image rows, and the parts of its inverse that count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .block_matrix import block_matrices, diagonal_block, sum_over_places

# Looking for a fixed point costs as much as half a step of small blocks: not after every one.
_LOOK_EVERY, _SMALL = 4, 64
# Rounding errors are at most about so many times those of an LU with full pivoting: errors of 2e-10
# in float64, of 1e-4 in float32.
_MAX_GROWTH = {torch.float64: 1e6, torch.float32: 1e3}


class BlockLU:
    """Block elimination of the matrix T of a zero-padded convolution, for all groups at once.

    With L, D, U from :func:`block_matrices`, from the first rows of the image to the last,

        S_0 = D        S_i = D - L S_(i-1)^-1 U        log|det T| = sum of log|det S_i|

    with pivoting inside of each S_i. As the blocks are the same everywhere, S_i often reaches a
    fixed point after a few steps, where the rest of the image costs nothing. Pivots are not sought
    outside of a block: ``weak`` says for which groups that lost too many digits, so that the result
    must not be used.

    Args:
        kernels: ``(G, c, c, kh, kw)`` in float64, or in float32 where that is good enough.
        size: ``(h, w)`` of the image.
        rows: image rows in a block, at least ``kh // 2``; all of them for one dense LU.

    Cost: ``(h / rows) * 20/3 m^3`` operations a group, ``m = rows w c``, less where the fixed point
    is reached; ``2 m^2`` numbers for each step taken.

    >>> kernel = torch.tensor([0.0, 2.0, 1.0]).double().reshape(1, 1, 1, 3, 1)
    >>> lu = BlockLU(kernel, (3, 1), rows=1)
    >>> round(lu.log_abs_det.item(), 4), lu.solve(torch.tensor([[[5.0], [4.0], [2.0]]]).double())
    (2.0794, tensor([[[1.7500],
             [1.5000],
             [1.0000]]], dtype=torch.float64))
    """

    def __init__(self, kernels: Tensor, size: tuple[int, int], rows: int) -> None:
        kernels = kernels.detach()
        self._shape, self._width, self._rows = kernels.shape, size[1], rows
        self._steps: list[_Step] = []
        self._look_every = _LOOK_EVERY if rows * size[1] * kernels.shape[1] < _SMALL else 1
        before = -(-size[0] // rows) - 1  # blocks but for the last
        if before:
            last = self._eliminate(kernels, before)
        else:
            last = diagonal_block(kernels, size[1], rows)
            self.weak = np.zeros(len(kernels), dtype=bool)
        # The last block may have fewer rows.
        self._tail = (size[0] - before * rows) * size[1] * kernels.shape[1]
        last = last[:, : self._tail, : self._tail]
        self._last_lu, self._last_pivots, _ = torch.linalg.lu_factor_ex(last)
        self.log_abs_det = self._last_lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(1)
        """``log |det T|`` of each group in nats, ``(G,)``; -inf where a pivot is 0."""
        # How often each step is taken: the last one kept stands for all that follow.
        self._times = [1] * len(self._steps)
        if before:
            self._times[-1] += before - len(self._steps)
            self.log_abs_det += self._logs.sum(0) + (self._times[-1] - 1) * self._logs[-1]

    def _eliminate(self, kernels: Tensor, before: int) -> Tensor:
        """Fills ``_steps``; returns the last S."""
        self._lower, diagonal, upper = _split(block_matrices(kernels, self._width, self._rows))
        # Columns one after the other, as LAPACK takes them.
        unit = torch.eye(upper.shape[2], dtype=upper.dtype).expand_as(upper).mT.contiguous().mT
        schur, logs, norms, rounding = diagonal, [], [], _rounding(diagonal)
        for i in range(before):
            lu, pivots, _ = torch.linalg.lu_factor_ex(schur)
            inverse = torch.linalg.lu_solve(lu, pivots, unit)
            reduced = inverse @ upper
            self._steps.append(_Step(inverse, reduced))
            logs.append(lu.diagonal(dim1=-2, dim2=-1).clone())
            norms.append(torch.linalg.vector_norm(inverse, dim=1))
            following = torch.baddbmm(diagonal, self._lower, reduced, alpha=-1)
            look = i % self._look_every == self._look_every - 1
            if look and _settled(schur, following, rounding):
                break
            schur = following
        self.weak = _growth(kernels, torch.stack(norms)) > _MAX_GROWTH[kernels.dtype]
        self._logs = torch.stack(logs).abs().log().sum(2)  # (steps, G)
        return following

    def move(self, device: torch.device) -> None:
        """Solve there from now on."""
        self._steps = [_Step(*(part.to(device) for part in step)) for step in self._steps]
        self._last_lu, self._last_pivots = self._last_lu.to(device), self._last_pivots.to(device)
        if self._steps:
            self._lower = self._lower.to(device)

    def solve(self, rhs: Tensor) -> Tensor:
        """``x`` with ``T x = rhs`` for each group, ``(G, h w c, N)``; differentiable in rhs."""
        before = sum(self._times)
        if not before:
            return torch.linalg.lu_solve(self._last_lu, self._last_pivots, rhs)
        size = self._lower.shape[2]
        parts = list(rhs.split([size] * before + [self._tail], 1))
        lower = [self._lower] * (before - 1) + [self._lower[:, : self._tail]]
        steps = [step for step, n in zip(self._steps, self._times, strict=True) for _ in range(n)]
        for i, step in enumerate(steps):
            parts[i] = step.inverse @ parts[i]
            parts[i + 1] = torch.baddbmm(parts[i + 1], lower[i], parts[i], alpha=-1)
        parts[-1] = torch.linalg.lu_solve(self._last_lu, self._last_pivots, parts[-1])
        for i in reversed(range(before)):
            reduced = steps[i].reduced[:, :, : parts[i + 1].shape[1]]
            parts[i] = torch.baddbmm(parts[i], reduced, parts[i + 1], alpha=-1)
        return torch.cat(parts, 1)

    def gradient(self) -> Tensor:
        """The gradient of ``log |det T|`` with respect to the kernels, ``(G, c, c, kh, kw)``.

        A tap's gradient is the sum of the transposed inverse over the tap's places. These lie in
        the blocks G of T^-1 on and beside the diagonal alone, which follow from the last to the
        first:

            G_nn = S_n^-1           G_(i+1,i) = -G_(i+1,i+1) L S_i^-1
            G_ii = S_i^-1 - S_i^-1 U G_(i+1,i)          G_(i,i+1) = -S_i^-1 U G_(i+1,i+1)

        Cost: ``8 m^3`` operations a step and group. Source: selected inversion, as in the
        recursive Green's functions of electronic transport.
        """
        size, tail = self._shape[1] * self._width * self._rows, self._tail
        corner = self._last_lu.new_zeros(self._shape[0], size, size)  # G_(i+1,i+1)
        unit = torch.eye(tail, dtype=corner.dtype).expand(len(corner), -1, -1)
        corner[:, :tail, :tail] = torch.linalg.lu_solve(self._last_lu, self._last_pivots, unit)
        on, below, above = corner.clone(), torch.zeros_like(corner), torch.zeros_like(corner)
        for step, times in zip(reversed(self._steps), reversed(self._times), strict=True):
            lower = self._lower @ step.inverse
            corners = torch.zeros_like(corner)
            left, rounding = times, _rounding(step.inverse)
            while left:
                down = corner @ lower
                following = torch.baddbmm(step.inverse, step.reduced, down)
                look = left > 1 and left % self._look_every == 0
                alike = left if look and _settled(corner, following, rounding) else 1
                below.sub_(down, alpha=alike)
                corners.add_(corner, alpha=alike)
                on.add_(following, alpha=alike)
                corner, left = following, left - alike
            above.baddbmm_(step.reduced, corners, alpha=-1)
        blocks = torch.cat([above.mT, on.mT, below.mT], 2)
        return sum_over_places(blocks, self._shape, self._width, self._rows)


class _Step(NamedTuple):
    inverse: Tensor  # S^-1: a product with it is 3 times as fast as two substitutions
    reduced: Tensor  # S^-1 U


def _split(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lower, diagonal, upper = (block.contiguous() for block in blocks.chunk(3, 2))
    return lower, diagonal, upper


def _rounding(like: Tensor) -> Tensor:
    """What two blocks of numbers such as these may differ by and be the same, ``(G,)``."""
    return 2 * torch.finfo(like.dtype).eps * like.abs().amax((1, 2))


def _settled(old: Tensor, new: Tensor, rounding: Tensor) -> bool:
    low, high = torch.aminmax((new - old).flatten(1), dim=1)
    return bool((torch.maximum(high, -low) <= rounding).all())


def _growth(kernels: Tensor, norms: Tensor) -> np.ndarray:
    """How far rounding errors of the elimination grow, ``(G,)``; nan counts as infinite.

    One step puts an error of ``|L| |S^-1| |S| |S^-1| |U|`` times the precision into the next S,
    relative to |T|. Norms are maximum row sums, but of S^-1 the largest norm of its columns,
    ``norms`` ``(steps, G, m)``: rounding errors have random signs.
    """
    sums = kernels.abs().sum((2, 4)).amax(1).numpy()  # (G, kh)
    centre = kernels.shape[3] // 2
    above, here, below = sums[:, :centre].sum(1), sums[:, centre], sums[:, centre + 1 :].sum(1)
    inverse = norms.amax(2).numpy()  # (steps, G)
    schur = here + above * below * np.concatenate([np.zeros_like(inverse[:1]), inverse[:-1]])
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        growth = above * below * inverse**2 * schur / (above + here + below)
    return np.nan_to_num(growth, nan=np.inf).max(0)
