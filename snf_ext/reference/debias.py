"""What the learned inverse lacks, estimated on probes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..bijection import wide_dtype
from . import convolution
from .autocast import without_autocast
from .checks import check_conv2d, check_linear

Map = Callable[[Tensor], Tensor]


def debias_linear(
    v: Tensor, weight: Tensor, weight_inv: Tensor, scales: Sequence[float], share: float
) -> tuple[Tensor, Tensor]:
    """An estimate of ``share (W^-1 - R)'``: what R' lacks as the gradient of log |det W|.

    With ``E = I - W R`` of spectral radius under 1, ``W^-1 = R (I + E + E^2 + ...)``, so that over
    random signs v

        (share / P) sum_p v_p u_p'    u = R (scales[0] E + ... + scales[K-1] E^K) v

    has the mean ``share (R (E + ... + E^K))'`` where the scales have the mean 1. Where E does not
    shrink the probes the series diverges, and the estimate is zeros.

    Args:
        v: P random signs, ``(P, D)``.
        weight, weight_inv: W and R.
        scales: one number a term.

    Returns:
        The estimate in the shape of W (float32 for half precision), and
        ``||E^K v|| / ||E^(K-1) v||`` over all probes, an estimate of ``||E||``. Neither has a
        gradient.

    Raises:
        ValueError: shapes do not match, or there are no probes or no scales.

    Cost: K products with W, K + 1 with R, of P samples each, and one of two ``(P, D)``.

    >>> import torch, snf_ext
    >>> v, eye = torch.ones(1, 2), torch.eye(2)
    >>> gradient, growth = snf_ext.reference.debias_linear(v, eye, eye / 2, [1.0], 1.0)
    >>> gradient.tolist(), growth.item()
    ([[0.25, 0.25], [0.25, 0.25]], 0.5)
    """
    if v.dim() != 2:
        raise ValueError(f"v must have shape [P, D]; got {list(v.shape)}")
    check_linear(v, weight, weight_inv, None)
    with torch.no_grad(), without_autocast(v.device):
        v, w, r = _wide(v, weight, weight_inv)
        u, growth = _series(v, lambda x: x @ w.T, lambda y: y @ r.T, scales)
        return _unless_growing(share / len(v) * v.T @ u, growth), growth


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
    """:func:`debias_linear` of the convolution's matrices; v is P images ``(P, C, H, W)``.

    The estimate is the gradient of w: a weight gradient with input u and output gradient v.
    """
    check_conv2d(v, weight, weight_inv, None, dilation, groups)
    with torch.no_grad(), without_autocast(v.device):
        v, w, r = _wide(v, weight, weight_inv)
        forward, backward = (
            partial(_convolve, kernel, dilation, groups, circular) for kernel in (w, r)
        )
        u, growth = _series(v, forward, backward, scales)
        summed = convolution.weight_gradient(v, u, w, dilation, groups, circular)
        return _unless_growing(share / len(v) * summed, growth), growth


def with_gradient(log_det: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """``log_det``, which also gives ``weight`` ``gradient`` for each of its elements."""
    linear = torch.dot(weight.to(gradient).flatten(), gradient.flatten())
    return log_det + (linear - linear.detach()).to(log_det)


def _series(
    v: Tensor, forward: Map, backward: Map, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``u`` as above, and how the last power of E grew."""
    if not len(v):
        raise ValueError(f"v must have at least one probe; got {list(v.shape)}")
    if not scales:
        raise ValueError("scales must have a number for each term; got none")
    before = power = v
    image, u = backward(v), torch.zeros_like(v)
    for scale in scales:
        before, power = power, power - forward(image)
        image = backward(power)
        u = u + scale * image
    smallest = torch.finfo(v.dtype).tiny
    return u, torch.linalg.vector_norm(power) / torch.linalg.vector_norm(before).clamp(min=smallest)


def _unless_growing(gradient: Tensor, growth: Tensor) -> Tensor:
    return torch.where(growth < 1, gradient, 0)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(wide_dtype(t.dtype)) for t in tensors)


def _convolve(kernel: Tensor, dilation: int, groups: int, circular: bool, x: Tensor) -> Tensor:
    return convolution.convolve(x, kernel, dilation, groups, circular)
