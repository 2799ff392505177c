"""Dispatch and fake kernels of the spline operator; see ``snf_ext.reference.rq_spline``."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tail_bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.rq_spline` on the backend in use."""
    return reference.rq_spline(x, widths, heights, derivatives, tail_bound, inverse)
