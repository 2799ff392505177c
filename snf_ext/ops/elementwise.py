"""Dispatch and fake kernels of the element-wise operators; see ``snf_ext.reference``."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def smooth_leaky_relu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.smooth_leaky_relu` on the backend in use."""
    return reference.smooth_leaky_relu(x, alpha)


def smooth_leaky_relu_inverse(z: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`snf_ext.reference.smooth_leaky_relu_inverse` on the backend in use."""
    return reference.smooth_leaky_relu_inverse(z, alpha)


def actnorm(
    x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.actnorm` on the backend in use."""
    return reference.actnorm(x, shift, log_scale, inverse)


def affine_coupling(x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.affine_coupling` on the backend in use."""
    return reference.affine_coupling(x, params, inverse)


def logit(x: Tensor, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`snf_ext.reference.logit` on the backend in use."""
    return reference.logit(x, alpha, inverse)


def normal_log_prob(z: Tensor) -> Tensor:
    """:func:`snf_ext.reference.normal_log_prob` on the backend in use."""
    return reference.normal_log_prob(z)
