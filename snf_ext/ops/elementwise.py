"""Dispatch and fake kernels of the element-wise operators.

The schemas are in ``csrc/schema.cpp``; autograd and autocast in ``csrc/autograd_elementwise.cpp``.
The arguments, results and exceptions are those of the plain twins in ``snf_ext.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import build_info, runs_native
from ..bijection import wide_dtype
from ..reference.checks import check_actnorm, check_affine_coupling, check_alpha, check_batch


def smooth_leaky_relu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.smooth_leaky_relu` on the backend in use."""
    if runs_native(x.device):
        return torch.ops.snf_ext.smooth_leaky_relu(x, alpha)
    return reference.smooth_leaky_relu(x, alpha)


def smooth_leaky_relu_inverse(z: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`snf_ext.reference.smooth_leaky_relu_inverse` on the backend in use."""
    if runs_native(z.device):
        return torch.ops.snf_ext.smooth_leaky_relu_inverse(z, alpha)
    return reference.smooth_leaky_relu_inverse(z, alpha)


def actnorm(
    x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.actnorm` on the backend in use."""
    if runs_native(x.device):
        return torch.ops.snf_ext.actnorm(x, shift, log_scale, inverse)
    return reference.actnorm(x, shift, log_scale, inverse)


def affine_coupling(x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.affine_coupling` on the backend in use."""
    if runs_native(x.device):
        return torch.ops.snf_ext.affine_coupling(x, params, inverse)
    return reference.affine_coupling(x, params, inverse)


def logit(x: Tensor, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.logit` on the backend in use."""
    if runs_native(x.device):
        return torch.ops.snf_ext.logit(x, alpha, inverse)
    return reference.logit(x, alpha, inverse)


def normal_log_prob(z: Tensor) -> Tensor:
    """:func:`snf_ext.reference.normal_log_prob` on the backend in use."""
    if runs_native(z.device):
        return torch.ops.snf_ext.normal_log_prob(z)
    return reference.normal_log_prob(z)


def _fake_sums(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=wide_dtype(x.dtype))


def _fake_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_sums(x)


def _fake_gradients(tensors: tuple[Tensor, ...], mask: list[bool]) -> tuple[Tensor, ...]:
    """A gradient that is not asked for has no elements."""
    return tuple(
        t.new_empty(t.shape if wanted else (0,)) for t, wanted in zip(tensors, mask, strict=True)
    )


if build_info()["cpp"]:

    @torch.library.register_fake("snf_ext::smooth_leaky_relu")
    def _(x: Tensor, alpha: float) -> Any:
        check_batch(x, "x")
        check_alpha(alpha)
        return _fake_pair(x)

    @torch.library.register_fake("snf_ext::smooth_leaky_relu_inverse")
    def _(z: Tensor, alpha: float) -> Any:
        check_batch(z, "z")
        check_alpha(alpha)
        return *_fake_pair(z), z.new_empty((), dtype=torch.int64)

    @torch.library.register_fake("snf_ext::logit")
    def _(x: Tensor, alpha: float, inverse: bool = False) -> Any:
        check_batch(x, "x")
        check_alpha(alpha, low=0.0, high=0.5)
        return _fake_pair(x)

    @torch.library.register_fake("snf_ext::actnorm")
    def _(x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool = False) -> Any:
        check_actnorm(x, shift, log_scale)
        return _fake_pair(x)

    @torch.library.register_fake("snf_ext::affine_coupling")
    def _(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
        check_affine_coupling(x, params)
        return _fake_pair(x)

    @torch.library.register_fake("snf_ext::normal_log_prob")
    def _(z: Tensor) -> Any:
        check_batch(z, "z")
        return _fake_sums(z)

    @torch.library.register_fake("snf_ext::smooth_leaky_relu_backward")
    @torch.library.register_fake("snf_ext::smooth_leaky_relu_inverse_backward")
    @torch.library.register_fake("snf_ext::logit_backward")
    def _(grad_y: Tensor, grad_log_abs_det: Tensor | None, x: Tensor, *rest: Any) -> Any:
        return x.new_empty(x.shape)

    @torch.library.register_fake("snf_ext::normal_log_prob_backward")
    def _(grad_log_prob: Tensor, z: Tensor) -> Any:
        return z.new_empty(z.shape)

    @torch.library.register_fake("snf_ext::actnorm_backward")
    @torch.library.register_fake("snf_ext::affine_coupling_backward")
    def _(grad_y: Tensor, grad_log_abs_det: Tensor | None, *tensors_and_rest: Any) -> Any:
        *tensors, _, mask = tensors_and_rest
        return _fake_gradients(tuple(tensors), mask)
