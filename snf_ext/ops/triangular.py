"""Dispatch of the substitution; see ``snf_ext.reference.triangular``."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def triangular_conv2d_solve(z: Tensor, weight: Tensor, upper: bool = False) -> Tensor:
    """:func:`snf_ext.reference.triangular_conv2d_solve` on the backend in use."""
    return reference.triangular_conv2d_solve(z, weight, upper)
