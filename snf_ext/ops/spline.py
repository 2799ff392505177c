"""Dispatch and fake kernels of the spline operator; see ``snf_ext.reference.rq_spline``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import build_info, runs_native
from ..bijection import wide_dtype
from ..reference.checks import check_rq_spline


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tail_bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.rq_spline` on the backend in use.

    The native gradient is exact and has no derivative of its own: differentiating it raises
    NotImplementedError.
    """
    if runs_native(x.device):
        return torch.ops.snf_ext.rq_spline(x, widths, heights, derivatives, tail_bound, inverse)
    return reference.rq_spline(x, widths, heights, derivatives, tail_bound, inverse)


if build_info()["cpp"]:

    @torch.library.register_fake("snf_ext::rq_spline")
    def _(
        x: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        tail_bound: float,
        inverse: bool = False,
    ) -> Any:
        check_rq_spline(x, widths, heights, derivatives, tail_bound)
        return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=wide_dtype(x.dtype))

    @torch.library.register_fake("snf_ext::rq_spline_backward")
    def _(
        grad_y: Tensor | None,
        grad_log_abs_det: Tensor | None,
        x: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        tail_bound: float,
        inverse: bool,
        output_mask: list[bool],
    ) -> Any:
        inputs = (x, widths, heights, derivatives)
        return tuple(
            x.new_empty(t.shape if wanted else (0,))
            for t, wanted in zip(inputs, output_mask, strict=True)
        )
