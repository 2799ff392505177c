"""The element-wise flow operators in plain torch.

Each returns the transformed tensor and, in float32 or wider, ``log |det|`` of each sample in nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bijection import per_sample_sum, wide_dtype
from .autocast import widened_under_autocast
from .checks import check_actnorm, check_affine_coupling, check_alpha, check_batch

LOG_SCALE_BOUND = 2.0
NEWTON_LIMIT = 100


def smooth_leaky_relu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``y = a x + (1 - a) log(1 + e^x)``, element by element; x ``(B, ...)``, a in (0, 1].

    Source: Gresele et al. 2020; SNF A.3 with a = 0.3.

    >>> y, log_abs_det = smooth_leaky_relu(torch.zeros(1, 2), 0.3)
    >>> round(y[0, 0].item(), 4), round(log_abs_det.item(), 4)
    (0.4852, -0.8616)
    """
    (x,) = widened_under_autocast(x)
    check_batch(x, "x")
    check_alpha(alpha)
    v = x.to(wide_dtype(x.dtype))
    return _leaky_value(v, alpha).to(x.dtype), per_sample_sum(_leaky_slope(v, alpha).log())


def smooth_leaky_relu_inverse(z: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`smooth_leaky_relu`, by Newton's method to the precision of the dtype.

    Returns:
        ``(x, log_abs_det, iterations)``: the last is the largest number of iterations that an
        element took, an int64 scalar. On this convex function Newton's method started on the
        right of the root converges without overshooting.

    >>> x, _, iterations = smooth_leaky_relu_inverse(torch.tensor([[0.4852]]), 0.3)
    >>> abs(x.item()) < 1e-3, iterations.item() < 10
    (True, True)
    """
    (z,) = widened_under_autocast(z)
    check_batch(z, "z")
    check_alpha(alpha)
    wide = z.to(wide_dtype(z.dtype))
    root = _LeakyRoot if torch.compiler.is_compiling() else _TransformedLeakyRoot
    x, count = root.apply(wide, alpha)
    log_abs_det = -per_sample_sum(_leaky_slope(x, alpha).log())
    return x.to(z.dtype), log_abs_det, count


@torch.library.custom_op("snf_ext::leaky_root", mutates_args=())
def _leaky_root(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """x and how many steps were taken; an operator, as tracing cannot see when they end."""
    # f(x) >= x and f(x) >= a x, so this start lies on the right of the root.
    x = torch.where(z > 0, z, z / alpha)
    tolerance = 4 * torch.finfo(z.dtype).eps
    iterations = 0
    while iterations < NEWTON_LIMIT and x.numel():
        step = (_leaky_value(x, alpha) - z) / _leaky_slope(x, alpha)
        step = torch.where(x.isinf(), 0, step)  # there already; f(x) - z is no number
        x = x - step
        iterations += 1
        if not (step.abs() > tolerance * (1 + x.abs())).any():
            break
    return x, torch.full((), iterations, dtype=torch.int64, device=z.device)


@_leaky_root.register_fake
def _(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty((), dtype=torch.int64)


class _LeakyRoot(torch.autograd.Function):
    """The root, whose derivative is ``1 / f'(x)``; in terms of x, so that it has one too."""

    @staticmethod
    def forward(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return _leaky_root(z, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, ...]) -> None:
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output[0])
        ctx.save_for_forward(output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / _leaky_slope(ctx.saved_tensors[0], ctx.alpha), None


class _TransformedLeakyRoot(_LeakyRoot):
    """With what the transforms of torch.func ask for, and tracing does not take."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, alpha: float) -> Any:
        x, count = _TransformedLeakyRoot.apply(z, alpha)
        return (x, count), (in_dims[0], None)

    @staticmethod
    def jvp(ctx: Any, z: Tensor, *rest: Any) -> tuple[Tensor, None]:
        return z / _leaky_slope(ctx.saved_tensors[0], ctx.alpha), None


def _leaky_value(x: Tensor, alpha: float) -> Tensor:
    # The threshold at which torch takes softplus for the identity, past float64's precision.
    return alpha * x + (1 - alpha) * F.softplus(x, threshold=40)


def _leaky_slope(x: Tensor, alpha: float) -> Tensor:
    return alpha + (1 - alpha) * torch.sigmoid(x)


def actnorm(
    x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``y = (x - shift) exp(-log_scale)`` for each channel; ``inverse`` undoes it.

    Args:
        x: ``(B, C, ...)``.
        shift, log_scale: ``(C,)``.

    Source: Kingma and Dhariwal 2018, "Glow".

    >>> y, log_abs_det = actnorm(torch.ones(1, 2, 3), torch.ones(2), torch.zeros(2))
    >>> y.abs().max().item(), log_abs_det.abs().tolist()
    (0.0, [0.0])
    """
    x, shift, log_scale = widened_under_autocast(x, shift, log_scale)
    check_actnorm(x, shift, log_scale)
    wide = wide_dtype(x.dtype)
    rest = (1,) * (x.dim() - 2)
    c, s = shift.to(wide).view(-1, *rest), log_scale.to(wide)
    scale = s.view(-1, *rest)
    v = x.to(wide)
    y = v * scale.exp() + c if inverse else (v - c) * (-scale).exp()
    total = math.prod(x.shape[2:]) * s.sum()
    return y.to(x.dtype), (total if inverse else -total).expand(x.shape[0]).clone()


def affine_coupling(x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The element-wise part of an affine coupling: the last T of C channels are transformed.

    ``y = x exp(l) + t`` with ``l = 2 tanh(raw / 2)``, so the scale stays within ``e^-2 .. e^2``;
    ``inverse`` undoes it. The first C - T channels pass.

    Args:
        x: ``(B, C, ...)``.
        params: what the coupling's network gives, ``(B, 2T, ...)``: raw, t, raw, t, ...

    Source: Dinh et al. 2016, "Real NVP"; the bound of the scale as in SNF's public code.

    >>> x = torch.randn(3, 4)
    >>> y, log_abs_det = affine_coupling(x, torch.zeros(3, 4))
    >>> torch.equal(y, x), log_abs_det.tolist()
    (True, [0.0, 0.0, 0.0])
    """
    x, params = widened_under_autocast(x, params)
    check_affine_coupling(x, params)
    wide = wide_dtype(x.dtype)
    channels, changed = x.shape[1], params.shape[1] // 2
    raw, t = params[:, ::2].to(wide), params[:, 1::2].to(wide)
    log_scale = LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)
    kept, v = x.split((channels - changed, changed), 1)
    v = v.to(wide)
    y = (v - t) * (-log_scale).exp() if inverse else v * log_scale.exp() + t
    total = per_sample_sum(log_scale)
    return torch.cat((kept, y.to(x.dtype)), 1), -total if inverse else total


def logit(x: Tensor, alpha: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """``y = log s - log(1 - s)`` with ``s = a + (1 - 2a) x``, element by element, x in [0, 1].

    Args:
        x: ``(B, ...)``.
        alpha: a, in [0, 0.5).
        inverse: map y to x instead.

    Source: Papamakarios et al. 2017; SNF A.3 with a = 1e-6.

    >>> y, log_abs_det = logit(torch.full((1, 1), 0.5), 0.0)
    >>> y.item(), round(log_abs_det.item(), 4)
    (0.0, 1.3863)
    """
    (x,) = widened_under_autocast(x)
    check_batch(x, "x")
    check_alpha(alpha, low=0.0, high=0.5)
    inner = 1 - 2 * alpha
    v = x.to(wide_dtype(x.dtype))
    if inverse:
        y = (torch.sigmoid(v) - alpha) / inner
        log_slope = F.logsigmoid(v) + F.logsigmoid(-v) - math.log(inner)
    else:
        log_s = torch.log(alpha + inner * v)
        # 1 - s from 1 - x: near x = 1, s itself has lost the digits.
        log_1ms = torch.log(alpha + inner * (1 - v))
        y, log_slope = log_s - log_1ms, math.log(inner) - log_s - log_1ms
    return y.to(x.dtype), per_sample_sum(log_slope)


def normal_log_prob(z: Tensor) -> Tensor:
    """``log N(z; 0, I)`` in nats of each sample, ``(B, ...) -> (B,)``, float32 or wider.

    >>> round(normal_log_prob(torch.zeros(1, 2)).item(), 4)
    -1.8379
    """
    (z,) = widened_under_autocast(z)
    check_batch(z, "z")
    flat = z.to(wide_dtype(z.dtype)).reshape(z.shape[0], math.prod(z.shape[1:]))
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))
