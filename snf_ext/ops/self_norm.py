"""Dispatch and fake kernels of the self-normalizing operators.

The schemas are in ``csrc/schema.cpp``; autograd and autocast in ``csrc/autograd.cpp``. The
arguments, results and exceptions are those of the plain twins in ``snf_ext.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import build_info, runs_native
from ..bijection import wide_dtype
from ..reference import convolution
from ..reference.checks import check_conv2d, check_linear


def snf_linear(
    x: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    bias: Tensor | None = None,
    reconstruct: bool = True,
    penalty_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`snf_ext.reference.snf_linear` on the backend in use."""
    arguments = (x, weight, weight_inv, bias, reconstruct, penalty_share)
    if runs_native(x.device):
        return torch.ops.snf_ext.snf_linear(*arguments)
    return reference.snf_linear(*arguments)


def snf_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
    reconstruct: bool = True,
    penalty_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`snf_ext.reference.snf_conv2d` on the backend in use."""
    arguments = (x, weight, weight_inv, bias, dilation, groups, circular)
    if runs_native(x.device):
        return torch.ops.snf_ext.snf_conv2d(*arguments, reconstruct, penalty_share)
    return reference.snf_conv2d(*arguments, reconstruct, penalty_share)


def convolve(x: Tensor, kernel: Tensor, dilation: int, groups: int, circular: bool) -> Tensor:
    """``k * x`` of the size of x, on the backend in use; differentiable as torch's own.

    Shapes: x ``(B, C, H, W)``. Both of one dtype.
    """
    geometry = (dilation, groups, circular)
    differentiated = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    if differentiated or not runs_native(x.device):
        return convolution.convolve(x, kernel, *geometry)
    return torch.ops.snf_ext.snf_conv2d_forward(x, kernel, kernel, None, *geometry, False)[0]


def conv2d_weight_gradient(
    delta: Tensor, x: Tensor, weight: Tensor, dilation: int, groups: int, circular: bool
) -> Tensor:
    """The gradient of ``<delta, w * x>`` in w, of the shape of ``weight``, on the backend in use.

    Shapes: delta and x ``(B, C, H, W)``. All in float32, or all in float64.
    """
    geometry = (dilation, groups, circular)
    if not runs_native(x.device):
        return convolution.weight_gradient(delta, x, weight, *geometry)
    # The backward of a layer that reconstructs nothing: it keeps neither z nor a residual.
    only_weight = [False, True, False, False]
    return torch.ops.snf_ext.snf_conv2d_backward(
        delta, None, None, x, None, None, weight, weight, None, *geometry, 0.0, only_weight
    )[1]


def _fake_forward(x: Tensor, batch: tuple[int, ...], reconstruct: bool) -> tuple[Tensor, ...]:
    """z, log_det, recon, residual; the last has no elements where nothing is reconstructed."""
    wide = wide_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, dtype=wide),
        x.new_empty(batch, dtype=wide),
        x.new_empty(x.shape if reconstruct else (0,), dtype=wide),
    )


def _fake_backward(
    x: Tensor, weight: Tensor, weight_inv: Tensor, mask: list[bool]
) -> tuple[Tensor, ...]:
    """Shapes of (dx, dW, dR, dc); a gradient that is not asked for has no elements."""
    shapes = (x.shape, weight.shape, weight_inv.shape, weight.shape[:1])
    return tuple(
        x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, mask, strict=True)
    )


if build_info()["cpp"]:

    @torch.library.register_fake("snf_ext::snf_linear_forward")
    def _(
        x: Tensor, weight: Tensor, weight_inv: Tensor, bias: Tensor | None, reconstruct: bool
    ) -> Any:
        check_linear(x, weight, weight_inv, bias)
        return _fake_forward(x, x.shape[:-1], reconstruct)

    @torch.library.register_fake("snf_ext::snf_conv2d_forward")
    def _(
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        dilation: int,
        groups: int,
        circular: bool,
        reconstruct: bool,
    ) -> Any:
        check_conv2d(x, weight, weight_inv, bias, dilation, groups)
        return _fake_forward(x, x.shape[:1], reconstruct)

    @torch.library.register_fake("snf_ext::snf_linear_backward")
    @torch.library.register_fake("snf_ext::snf_conv2d_backward")
    def _(
        grad_z: Tensor,
        grad_log_det: Tensor | None,
        grad_recon: Tensor | None,
        x: Tensor,
        z: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        *geometry_share_and_mask: Any,
    ) -> Any:
        mask = list(geometry_share_and_mask[-1])
        mask[2] = mask[2] and z is not None and residual is not None
        return _fake_backward(x, weight, weight_inv, mask)
