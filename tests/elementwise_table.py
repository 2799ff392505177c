"""The one table of element-wise operators, each with its formula in numpy's float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import snf_ext


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return np.exp(-softplus(-x))


def leaky(x, alpha):
    return alpha * x + (1 - alpha) * softplus(x), np.log(alpha + (1 - alpha) * sigmoid(x))


def leaky_inverse(z, alpha):
    """By bisection: nothing in common with Newton's method."""
    low, high = np.minimum(z, z / alpha) - 1 / alpha, np.maximum(z, z / alpha) + 1
    for _ in range(200):
        middle = (low + high) / 2
        right = leaky(middle, alpha)[0] > z
        low, high = np.where(right, low, middle), np.where(right, middle, high)
    return high, -leaky(high, alpha)[1]


def logit(x, alpha, inverse=False):
    inner = 1 - 2 * alpha
    if inverse:
        s = sigmoid(x)
        return (s - alpha) / inner, np.log(s) + np.log(sigmoid(-x)) - np.log(inner)
    s, rest = alpha + inner * x, alpha + inner * (1 - x)
    return np.log(s / rest), np.log(inner / (s * rest))


def actnorm(x, shift, log_scale, inverse=False):
    column = (slice(None), *[None] * (x.ndim - 2))
    c, s = shift[column], log_scale[column] + np.zeros_like(x)
    return (x * np.exp(s) + c, s) if inverse else ((x - c) / np.exp(s), -s)


def coupling(x, params, inverse=False):
    changed = params.shape[1] // 2
    y, logs = x.copy(), np.zeros_like(x)
    for j in range(changed):
        at, log_scale = x.shape[1] - changed + j, 2 * np.tanh(params[:, 2 * j] / 2)
        t = params[:, 2 * j + 1]
        y[:, at] = (
            (x[:, at] - t) / np.exp(log_scale) if inverse else x[:, at] * np.exp(log_scale) + t
        )
        logs[:, at] = -log_scale if inverse else log_scale
    return y, logs


def normal(z):
    return None, -0.5 * (z**2 + np.log(2 * np.pi))


@dataclass(frozen=True)
class ElementwiseCase:
    """One operator with one set of shapes: its tensors, then the rest of its arguments."""

    name: str
    op: str
    formula: Callable
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple = ()
    unit_interval: bool = False

    def function(self, *tensors):
        """On the backend in use, as a tuple without the count of iterations."""
        out = getattr(snf_ext.ops, self.op)(*tensors, *self.rest)
        return out[:2] if isinstance(out, tuple) else (out,)

    def truth(self, *tensors):
        y, logs = self.formula(*(t.detach().cpu().double().numpy() for t in tensors), *self.rest)
        sums = logs.reshape(len(logs), int(np.prod(logs.shape[1:]))).sum(1)
        return (sums,) if y is None else (y, sums)

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for shape in self.shapes:
            if self.unit_interval:
                t = 0.02 + 0.96 * torch.rand(shape, generator=generator, dtype=torch.float64)
            else:
                t = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn.append(t.to(device, dtype))
        return drawn

    def gradients(self, outputs, seed=1):
        """Of the outputs: different for every element."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(t.shape, generator=generator).to(t) for t in outputs]


def cases():
    images, large = (3, 4, 3, 5), (2, 3, 17, 19)
    for shape in (images, (5, 7), (4,), large):
        size = "x".join(map(str, shape))
        for alpha in (0.3, 0.01, 1.0):
            arguments = ((shape,), (alpha,))
            yield ElementwiseCase(f"leaky-{alpha}-{size}", "smooth_leaky_relu", leaky, *arguments)
            name = f"leaky-inverse-{alpha}-{size}"
            yield ElementwiseCase(name, "smooth_leaky_relu_inverse", leaky_inverse, *arguments)
        for alpha in (0.0, 0.05):
            name = f"logit-{alpha}-{size}"
            yield ElementwiseCase(
                name, "logit", logit, (shape,), (alpha, False), unit_interval=True
            )
            name = f"logit-inverse-{alpha}-{size}"
            yield ElementwiseCase(name, "logit", logit, (shape,), (alpha, True))
        yield ElementwiseCase(f"normal-{size}", "normal_log_prob", normal, (shape,))
        if len(shape) == 1:
            continue
        for inverse in (False, True):
            end = f"{'-inverse' if inverse else ''}-{size}"
            shapes = (shape, shape[1:2], shape[1:2])
            yield ElementwiseCase(f"actnorm{end}", "actnorm", actnorm, shapes, (inverse,))
            for changed in (1, shape[1] - 1, shape[1]):
                params = (shape[0], 2 * changed, *shape[2:])
                name = f"coupling-{changed}{end}"
                yield ElementwiseCase(
                    name, "affine_coupling", coupling, (shape, params), (inverse,)
                )


ELEMENTWISE = list(cases())
