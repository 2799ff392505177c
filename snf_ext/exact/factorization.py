"""A factorised matrix: its log-determinant and the solution of linear systems."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .convolution import ConvolutionLU


class Factorization(Protocol):
    """What a layer needs of its factorised matrix A of size ``(D, D)``."""

    @property
    def log_abs_det(self) -> Tensor:
        """``log |det A|`` in nats, a scalar in float64; -inf if A is singular."""
        ...

    def solve(self, rhs: Tensor) -> Tensor:
        """``x`` with ``A x = rhs`` for each row of ``rhs``, shapes ``(B, D)``."""
        ...


class DenseLU:
    """LU with partial pivoting in float64, on the CPU where a device lacks float64.

    Cost: 2/3 D^3 operations once, 2 D^2 for each solved row; 8 D^2 bytes.

    >>> lu = DenseLU(2 * torch.eye(3))
    >>> round(lu.log_abs_det.item(), 4), lu.solve(torch.ones(1, 3)).tolist()
    (2.0794, [[0.5, 0.5, 0.5]])
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix.detach()
        if matrix.device.type == "mps":
            matrix = matrix.cpu()
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix.double())
        self.log_abs_det = self._lu.diagonal().abs().log().sum()

    def solve(self, rhs: Tensor) -> Tensor:
        if torch.isneginf(self.log_abs_det):
            raise ValueError("weight is singular: the layer has no inverse")
        columns = rhs.T.to(self._lu.device).to(self._lu.dtype)  # in turn: MPS has no float64
        solved = torch.linalg.lu_solve(self._lu, self._pivots, columns).T
        return solved.to(rhs.dtype).to(rhs.device)


def factorize_linear(weight: Tensor) -> Factorization:
    """Factorise the weight of a linear layer, ``(D, D)``. Cost O(D^3)."""
    return DenseLU(weight)


def factorize_conv2d(
    weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int, circular: bool
) -> Factorization:
    """Factorise the matrix of a convolution on ``(H, W)`` images; see :class:`ConvolutionLU`."""
    return ConvolutionLU(weight, spatial_shape, dilation, groups, circular)
