"""Exact values of convolutions by their dense matrix, as they were computed before.

:func:`swapped` makes the package's layers use these in place of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from snf_ext import exact
from snf_ext.exact.factorization import DenseLU, Factorization

__all__ = ["DenseInverse", "Nothing", "dense_log_abs_det", "dense_lu", "swapped"]

Size = tuple[int, int]


def dense_lu(weight: Tensor, size: Size, dilation: int, groups: int, circular: bool) -> DenseLU:
    """One LU of the whole matrix in float64."""
    matrix = exact.conv2d_matrix(weight.detach().double(), size, dilation, groups, circular)
    return DenseLU(matrix)


def dense_log_abs_det(
    weight: Tensor, size: Size, dilation: int, groups: int, circular: bool
) -> Tensor:
    """``log |det T(w)|``, differentiable, in the precision of w."""
    matrix = exact.conv2d_matrix(weight, size, dilation, groups, circular)
    return torch.linalg.slogdet(matrix).logabsdet


class DenseInverse:
    """The inverse matrix, by which rows are multiplied: the public code's way to sample."""

    def __init__(self, weight: Tensor, *geometry: object, dtype: torch.dtype) -> None:
        matrix = exact.conv2d_matrix(weight.detach().to(dtype), *geometry)  # type: ignore[arg-type]
        self._inverse = torch.linalg.inv(matrix)

    def solve(self, rhs: Tensor) -> Tensor:
        return (rhs.to(self._inverse) @ self._inverse.T).to(rhs)


class Determinant:
    """The determinant alone, in the precision of w: the public code's way to a likelihood."""

    def __init__(self, weight: Tensor, *geometry: object) -> None:
        self.log_abs_det = dense_log_abs_det(weight.detach(), *geometry)  # type: ignore[arg-type]


class Nothing:
    """Neither a determinant nor a solution: what is left is the time of all else."""

    def __init__(self, weight: Tensor, *geometry: object) -> None:
        self.log_abs_det = torch.zeros(())

    def solve(self, rhs: Tensor) -> Tensor:
        return rhs


@contextlib.contextmanager
def swapped(
    factorize: Callable[..., Factorization | DenseInverse | Determinant] | None = None,
    log_abs_det: Callable[..., Tensor] | None = None,
    cached: bool = True,
) -> Iterator[None]:
    """Layers factorise convolutions, and differentiate their determinants, by these functions.

    With ``cached=False`` every use factorises anew. What layers have kept stays with them.
    """
    places = [
        (exact.of_layer, "factorize_conv2d", factorize),
        (exact, "conv2d_log_abs_det", log_abs_det),
    ]
    if not cached:
        places.append((exact.FactorizationCache, "get", lambda _, weight, key, make: make()))
    kept = [(where, name, getattr(where, name)) for where, name, _ in places]
    try:
        for where, name, function in places:
            if function is not None:
                setattr(where, name, function)
        yield
    finally:
        for where, name, function in kept:
            setattr(where, name, function)
