"""Dispatch of the operators that correct the learned inverse; see ``snf_ext.reference.debias``.

They are composed of others, on every device, and need no fake kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backend import runs_native


@torch.no_grad()
def debias_linear(
    v: Tensor, weight: Tensor, weight_inv: Tensor, scales: Sequence[float], share: float
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.debias_linear` on the backend in use."""
    arguments = (v, weight, weight_inv, scales, share)
    if runs_native(v.device):
        return torch.ops.snf_ext.debias_linear(*arguments)
    return reference.debias_linear(*arguments)


@torch.no_grad()
def debias_conv2d(
    v: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    dilation: int,
    groups: int,
    circular: bool,
    scales: Sequence[float],
    share: float,
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.debias_conv2d` on the backend in use."""
    arguments = (v, weight, weight_inv, dilation, groups, circular, scales, share)
    if runs_native(v.device):
        return torch.ops.snf_ext.debias_conv2d(*arguments)
    return reference.debias_conv2d(*arguments)


def with_gradient(log_det: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """:func:`snf_ext.reference.with_gradient` on the backend in use."""
    if runs_native(log_det.device):
        return torch.ops.snf_ext.with_gradient(log_det, weight, gradient)
    return reference.with_gradient(log_det, weight, gradient)
