"""The rational-quadratic spline in float64 numpy, written from the equations, one element a time.

Nothing here uses the package. The inverse is found by bisection of the forward map, and gradients
by central differences, so that no formula for either is shared with what is tested.
"""

from __future__ import annotations

import math

import numpy as np

SMALLEST = 1e-3  # share of a bin, slope of a knot


def knots(raw, bound):
    """Ends of the bins on [-bound, bound]."""
    e = np.exp(raw - raw.max())
    sizes = SMALLEST + (1 - SMALLEST * len(raw)) * e / e.sum()
    inner = -bound + 2 * bound * np.cumsum(sizes)[:-1]
    return np.array([-bound, *inner, bound])


def slopes(raw):
    shift = math.log(math.expm1(1 - SMALLEST))
    return np.array([1.0, *(SMALLEST + np.logaddexp(0, raw + shift)), 1.0])


def element(x, xs, ys, ds):
    """(y, log dy/dx) by the formulas of the paper."""
    if not xs[0] <= x <= xs[-1]:
        return x, 0.0
    k = min(int(np.searchsorted(xs, x, side="right")) - 1, len(xs) - 2)
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, t = h / w, (x - xs[k]) / w
    below = s + (ds[k] + ds[k + 1] - 2 * s) * t * (1 - t)
    y = ys[k] + h * (s * t**2 + ds[k] * t * (1 - t)) / below
    above = s**2 * (ds[k + 1] * t**2 + 2 * s * t * (1 - t) + ds[k] * (1 - t) ** 2)
    return y, math.log(above / below**2)


def element_inverse(y, xs, ys, ds):
    """(x, log dx/dy) by bisection."""
    if not ys[0] <= y <= ys[-1]:
        return y, 0.0
    low, high = xs[0], xs[-1]
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle, -element(middle, xs, ys, ds)[1]
        low, high = (middle, high) if element(middle, xs, ys, ds)[0] < y else (low, middle)


def rq_spline(x, widths, heights, derivatives, bound, inverse=False):
    """(y, log_abs_det) of a batch (B, *S)."""
    bins, event = widths.shape[-1], x.shape[1:]
    own = widths.ndim == x.ndim + 1 and widths.shape[0] == x.shape[0]
    every = [
        np.broadcast_to(p.reshape(*(x.shape if own else (1, *event)), n), (*x.shape, n))
        for p, n in ((widths, bins), (heights, bins), (derivatives, bins - 1))
    ]
    function = element_inverse if inverse else element
    y, logs = np.empty_like(x), np.empty_like(x)
    for at in np.ndindex(*x.shape):
        w, h, d = (p[at] for p in every)
        y[at], logs[at] = function(x[at], knots(w, bound), knots(h, bound), slopes(d))
    return y, logs.reshape(len(x), -1).sum(1)
