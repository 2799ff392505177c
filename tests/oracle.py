"""What the layers should give, in float64 and term by term, and how large their terms are.

Where all numbers are finite these are the reference's convolutions in float64; otherwise each tap
is a loop of its own. Every function runs in three modes:

- ``EXACT``: the value. Padding is no term: where an image ends, nothing is multiplied.
- ``SIZE``: the sum of the terms' absolute values, by which rounding errors are judged. At every
  stage at least the smallest normal number, so that underflow counts as rounding.
- ``REACH``: the same, but infinite where an intermediate may overflow or where padding meets a
  number that is not finite. Where it is small, no order of summation gives anything but a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from snf_ext.reference import convolution

EXACT, SIZE, REACH = "exact", "size", "reach"


@dataclass
class Mode:
    kind: str
    dtype: torch.dtype = torch.float32
    wild: bool = True  # there are numbers that are not finite
    peak: float = 0.0  # the largest that was met on the way

    @property
    def limit(self) -> float:
        return torch.finfo(self.dtype).max / 8

    def of(self, t: Tensor | None) -> Tensor | None:
        """An argument of the operator."""
        if t is None:
            return None
        t = t.double()
        # Not abs(), whose derivative at 0 is 0; and -0 becomes 0.
        return t if self.kind == EXACT else torch.where(t < 0, -t, t) + 0.0

    def minus(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b if self.kind == EXACT else a + b

    def stage(self, t: Tensor) -> Tensor:
        """What is computed on the way."""
        if self.kind == EXACT:
            return t
        t = _Stage.apply(t, self)
        return t if self.kind == SIZE else torch.where(t < self.limit, t, torch.inf)

    def underflow(self, t: Tensor) -> Tensor:
        t = t + torch.finfo(self.dtype).tiny
        if t.numel():
            self.peak = max(self.peak, t.max().item())
        return t


class _Stage(torch.autograd.Function):
    """Where an operator stores what it computed, and its backward pass the gradient of it."""

    @staticmethod
    def forward(ctx, t, mode):
        ctx.mode = mode
        return mode.underflow(t)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.mode.underflow(gradient), None


class Linear:
    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    def per_sample(self, q):
        return q[:, None]

    def bias(self, c):
        return c

    def apply(self, w, x):
        return x @ w.T

    def transposed(self, w, d):
        return d @ w

    def outer(self, d, x, like):
        return d.T @ x

    def turned(self, other, own):
        return other.T


@dataclass
class Conv2d:
    mode: Mode
    size: tuple[int, int]
    dilation: int = 1
    groups: int = 1
    circular: bool = False

    def per_sample(self, q):
        return q[:, None, None, None]

    def bias(self, c):
        return c[:, None, None]

    def _near(self, x, kernel, a, b):
        """x a tap away, zeros outside; and where it is inside."""
        height, width = self.size
        down = (a - kernel[0] // 2) * self.dilation
        right = (b - kernel[1] // 2) * self.dilation
        rows, columns = torch.arange(height) + down, torch.arange(width) + right
        if self.circular:
            return x[:, :, rows[:, None] % height, columns % width], None
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        near = x[:, :, rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)]
        return torch.where(inside, near, 0), inside

    def _only(self, inside, t):
        return t if inside is None or self.mode.kind == REACH else torch.where(inside, t, 0)

    def _grouped(self, t):
        return t.unflatten(1, (self.groups, -1))

    @property
    def geometry(self):
        return self.dilation, self.groups, self.circular

    def apply(self, w, x):
        if not self.mode.wild:
            return convolution.convolve(x, w, *self.geometry)
        out = 0
        grouped = w.unflatten(0, (self.groups, -1))
        for a in range(w.shape[2]):
            for b in range(w.shape[3]):
                near, inside = self._near(x, w.shape[2:], a, b)
                tap = torch.einsum("goi,bgihw->bgohw", grouped[..., a, b], self._grouped(near))
                out = out + self._only(inside, tap.flatten(1, 2))
        return out

    def mixed(self, w, x):
        """The same with other numbers of outputs than of inputs."""
        if not self.mode.wild:
            return F.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2))
        out = 0
        for a in range(w.shape[2]):
            for b in range(w.shape[3]):
                near, inside = self._near(x, w.shape[2:], a, b)
                tap = torch.einsum("oi,bihw->bohw", w[:, :, a, b], near)
                out = out + self._only(inside, tap)
        return out

    def transposed(self, w, d):
        return self.apply(convolution.flip(w, self.groups), d)

    def outer(self, d, x, like):
        if not self.mode.wild:
            return convolution.weight_gradient(d, x, like, *self.geometry)
        taps = []
        for a in range(like.shape[2]):
            for b in range(like.shape[3]):
                near, inside = self._near(x, like.shape[2:], a, b)
                pair = self._grouped(self._only(inside, d)), self._grouped(near)
                taps.append(torch.einsum("bgohw,bgihw->goi", *pair))
        return torch.stack(taps, -1).reshape(like.shape)

    def turned(self, other, own):
        """Where one stands in transposed place of the other, as often as it does."""
        if not self.mode.wild:
            return convolution.inverse_term(other, own, self.size, *self.geometry)
        grouped = other.unflatten(0, (self.groups, -1)).transpose(1, 2).reshape(other.shape)
        out = torch.zeros(own.shape, dtype=torch.float64)
        for a, c, rows in self._matches(0, own.shape[2], other.shape[2]):
            for b, d, columns in self._matches(1, own.shape[3], other.shape[3]):
                out[..., a, b] += rows * columns * grouped[..., c, d]
        return out

    def _matches(self, axis, own, other):
        extent = self.size[axis]
        for a in range(own):
            for c in range(other):
                at = (a - own // 2) * self.dilation
                total = at + (c - other // 2) * self.dilation
                met = total % extent == 0 if self.circular else total == 0
                often = extent if self.circular else extent - abs(at)
                if self.mode.kind == REACH:  # products with 0 are made by some
                    yield a, c, max(often, 0) if met else 0
                elif met and often > 0:
                    yield a, c, often


def layer(of, x, w, r, c, dz, g, q, reconstruct=True, share=1.0):
    """z, recon and the gradients of x, w, r, c; None where there is none."""
    mode = of.mode
    x, w, r, c, dz, g, q = (mode.of(t) for t in (x, w, r, c, dz, g, q))
    y = mode.stage(of.apply(w, x))
    z = y if c is None else mode.stage(y + of.bias(c))
    # y is read back from z: what a large bias takes away is lost.
    back = z if c is None else mode.minus(z, of.bias(c))
    total, dx = g.sum(), mode.stage(of.transposed(w, dz))
    dc = None if c is None else mode.stage(dz.sum([d for d in range(dz.dim()) if d != 1]))
    if not reconstruct:
        dw = mode.stage(of.outer(mode.stage(dz), x, w)) + mode.stage(total * of.turned(r, w))
        return z, torch.zeros(len(x), dtype=x.dtype), dx, dw, None, dc
    e = mode.stage(mode.minus(of.apply(r, y), x))
    recon = mode.stage(e.square().flatten(1).sum(1))
    pull = mode.stage(2 * of.per_sample(q) * e)
    delta = dz / 2
    if share:
        delta = delta + share * mode.stage(of.transposed(r, pull))
        if mode.kind != EXACT:  # the factor q may come after the sum
            early = mode.stage(of.transposed(r, e))
            delta = delta + 0 * early if mode.kind == REACH else delta
    dw = of.outer(mode.stage(delta), x, w) + mode.stage(total / 2 * of.turned(r, w))
    delta = mode.minus(pull, dx / 2)
    dr = of.outer(mode.stage(delta), back, r)
    dr = mode.minus(dr, mode.stage(total / 2 * of.turned(w, r)))
    return z, recon, dx, mode.stage(dw), mode.stage(dr), dc


def network(mode, x, w1, b1, w2, b2, w3, b3, logs):
    """y; and the two images before their ReLUs."""
    x, w1, b1, w2, b2, w3, b3 = (mode.of(t) for t in (x, w1, b1, w2, b2, w3, b3))
    conv, scale = Conv2d(mode, x.shape[2:]), torch.exp(3 * logs.double())
    first = mode.stage(conv.mixed(w1, x) + b1[:, None, None])
    second = mode.stage(conv.mixed(w2, _relu(first)) + b2[:, None, None])
    # The scale is taken into the kernel.
    w3, b3 = mode.stage(w3 * scale[..., None]), mode.stage(b3 * scale.flatten())
    return mode.stage(conv.mixed(w3, _relu(second)) + b3[:, None, None]), first, second


def _relu(t):
    return torch.where(t <= 0, 0, t)  # NaN goes on


def substitution(mode, z, w, upper):
    """x of ``w * x = z``, a pixel after the other; its sizes likewise."""
    z, w = mode.of(z), mode.of(w)
    if upper:
        z, w = z.flip(1, 2, 3), w.flip(0, 1, 2, 3)
    channels, height, width = z.shape[1:]
    rows, columns = w.shape[2:]
    x = F.pad(torch.zeros_like(z), (columns - 1, 0, rows - 1, 0))
    for h in range(height):
        for c in range(width):
            for o in range(channels):
                own = z[:, o, h, c]
                for a in range(max(0, rows - 1 - h), rows):
                    for b in range(max(0, columns - 1 - c), columns):
                        last = (a, b) == (rows - 1, columns - 1)
                        for i in range(o if last else channels):
                            term = w[o, i, a, b] * x[:, i, h + a, c + b]
                            own = mode.minus(own, term)
                x[:, o, h + rows - 1, c + columns - 1] = mode.stage(own / w[o, o, -1, -1])
    x = x[:, :, rows - 1 :, columns - 1 :]
    return x.flip(1, 2, 3) if upper else x
