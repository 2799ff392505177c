"""The monotone rational-quadratic spline in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bijection import per_sample_sum, wide_dtype
from .autocast import widened_under_autocast
from .checks import check_rq_spline

MIN_WIDTH = MIN_HEIGHT = 1e-3  # of a bin, as a share of the interval
MIN_DERIVATIVE = 1e-3
MAX_DERIVATIVE = 1e15  # squares and ratios of slopes stay finite in float32
# Added to a raw derivative, so that 0 stands for the slope 1 of the tails.
UNIT_SLOPE = math.log(math.expm1(1 - MIN_DERIVATIVE))


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tail_bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic spline on ``[-T, T]``, the identity outside, element by element.

    Knots ``(x_k, y_k)`` with slopes ``d_k``; in bin k, with w and h its width and height,
    ``s = h / w`` and ``t = (x - x_k) / w``,

        y = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_{k+1} - 2 s) t (1 - t))

    Widths and heights are a softmax of the raw parameters, slopes a softplus, each at least 1e-3
    of the interval and 1e-3, slopes at most 1e15; the slopes at both ends are 1, and raw
    derivatives of 0 mean 1. Infinities and NaN in x are themselves outside: y = x.

    Args:
        x: ``(B, *S)``.
        widths, heights: raw, ``(*S, K)`` shared by the batch (``(1, *S, K)`` is the same), or
            ``(B, *S, K)``: one set for each element.
        derivatives: raw, at the inner knots: the same shape but K - 1 last.
        tail_bound: T, in [1e-30, 1e30].
        inverse: map y to x instead.

    Returns:
        ``(y, log_abs_det)`` of shapes ``(B, *S)`` and ``(B,)``: the logarithm of the slope in
        nats, summed over all but the first dimension (of the inverse, if ``inverse``).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.

    Cost: O(B D K) here, with temporaries of that size; natively O(D K) once a step for shared
    parameters and O(B D). Source: Durkan et al. 2019, "Neural Spline Flows"; SNF A.3.

    >>> x, zeros = torch.tensor([[-20.0, 0.5, 3.0]]), torch.zeros(3, 5)
    >>> y, log_abs_det = rq_spline(x, zeros, zeros, zeros[:, 1:], 10.0)
    >>> torch.allclose(y, x), log_abs_det.abs().item() < 1e-5
    (True, True)
    """
    x, widths, heights, derivatives = widened_under_autocast(x, widths, heights, derivatives)
    check_rq_spline(x, widths, heights, derivatives, tail_bound)
    wide = wide_dtype(x.dtype)
    v = x.to(wide)
    knots_x = _knots(widths.to(wide), MIN_WIDTH, tail_bound)
    knots_y = _knots(heights.to(wide), MIN_HEIGHT, tail_bound)
    slope = MIN_DERIVATIVE + F.softplus(derivatives.to(wide) + UNIT_SLOPE)
    slopes = F.pad(slope.clamp(max=MAX_DERIVATIVE), (1, 1), value=1.0)

    inside = (v >= -tail_bound) & (v <= tail_bound)
    # Elsewhere any point of the interval will do: its result is not used.
    p = torch.where(inside, v, torch.zeros_like(v))
    axis = knots_y if inverse else knots_x
    k = (p[..., None] >= axis[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (
        table.expand(*v.shape, -1).gather(-1, k + step)[..., 0]
        for table in (knots_x, knots_y, slopes)
        for step in (0, 1)
    )
    w, h = x1 - x0, y1 - y0
    s = h / w
    if inverse:  # 1 - t by itself: where d1 is steep it is tiny, and decides the slope
        t, u = _inverse_places(((p - y0) / h).clamp(0, 1), ((y1 - p) / h).clamp(0, 1), s, d0, d1)
    else:
        t = ((p - x0) / w).clamp(0, 1)
        u = 1 - t
    both = t * u
    # The denominator s + (d0 + d1 - 2 s) t (1 - t), as a sum of positive terms.
    below = s * (1 - 2 * both) + (d0 + d1) * both
    y = x0 + w * t if inverse else y0 + h * ((s * t * t + d0 * both) / below)
    ratio = s / below
    log_slope = torch.log((d1 * t * t + 2 * s * both + d0 * u * u) * ratio * ratio)
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, torch.zeros_like(v))
    return torch.where(inside, y, v).to(x.dtype), per_sample_sum(log_slope)


def _knots(raw: Tensor, smallest: float, tail_bound: float) -> Tensor:
    """The K + 1 knots on ``[-T, T]`` of raw bin sizes."""
    sizes = _bin_sizes(raw, smallest)
    inner = 2 * tail_bound * sizes.cumsum(-1)[..., :-1] - tail_bound
    return F.pad(F.pad(inner, (1, 0), value=-tail_bound), (0, 1), value=tail_bound)


def _bin_sizes(raw: Tensor, smallest: float = MIN_WIDTH) -> Tensor:
    """Shares of the interval."""
    return smallest + (1 - smallest * raw.shape[-1]) * torch.softmax(raw, -1)


def _inverse_places(
    v: Tensor, rest: Tensor, s: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """t and 1 - t for a value at the share ``v = 1 - rest`` of its bin's height.

    t is the root of ``(s - q) t^2 + q t - s v = 0`` with ``q = d0 (1 - v) - d1 v + 2 s v``, whose
    discriminant is a sum of positive terms; 1 - t is that of the bin seen from its other end.
    """
    m = d0 * rest - d1 * v
    root = torch.sqrt(m * m + 4 * s * s * (v * rest))
    return _root(m + 2 * s * v, s, v, root), _root(2 * s * rest - m, s, rest, root)


def _root(q: Tensor, s: Tensor, v: Tensor, root: Tensor) -> Tensor:
    """Each sign of q has a form that does not cancel."""
    above = torch.where(q >= 0, 2 * s * v, root - q)
    below = torch.where(q >= 0, q + root, 2 * (s - q))
    return (above / below).clamp(0, 1)
