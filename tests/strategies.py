"""What hypothesis draws for the operators: numbers, layouts, and arguments made of them.

A tensor is one draw, from which follow its numbers and how they lie in memory, and no strategy is
made while drawing: 20,000 examples then take minutes.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# How many examples each test draws.
EXAMPLES = int(os.environ.get("SNF_EXAMPLES", "30"))
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)

whole = functools.cache(st.integers)
one_of = functools.cache(lambda *choices: st.sampled_from(choices))
flags = st.booleans()
dtypes = one_of(torch.float32, torch.float64, torch.bfloat16, torch.float16)
seeds = whole(0, 2**31 - 1)

# ---- Numbers -----------------------------------------------------------------------------------

FINITE = ("plain", "plain", "zeros", "small", "large")
KINDS = (*FINITE, "wild")


def special(kind: str, dtype: torch.dtype) -> list[float]:
    """What stands here and there among ordinary numbers."""
    info, half = torch.finfo(dtype), dtype == torch.float16
    return {
        "plain": [],
        "zeros": [0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 4],
        "small": [1e-6, -1e-6] if half else [1e-30, -1e-30, 1e-12],
        "large": [3e4, -1e3] if half else [1e30, -1e30, 1e12],
        "wild": [torch.inf, -torch.inf, torch.nan, 0.0],
    }[kind]


def tensor(seed: int, kinds, shape, dtype, scale=1.0, low=None) -> torch.Tensor:
    """Normal numbers times ``scale``, or uniform ones from ``low`` to low + scale."""
    kind, how = kinds[seed % len(kinds)], LAYOUTS[seed // len(kinds) % len(LAYOUTS)]
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        t = torch.randn(shape, generator=generator).mul_(scale)
    else:
        t = torch.rand(shape, generator=generator).mul_(scale).add_(low)
    t, choices = t.to(dtype), special(kind, dtype)
    if choices and t.numel():
        # Few, so that something is left that they do not reach.
        for drawn_at in torch.randint(2**30, (1 + seed % 3,), generator=generator).tolist():
            t.view(-1)[drawn_at % t.numel()] = choices[drawn_at // 64 % len(choices)]
    return lay_out(t, how)


# ---- Layouts -----------------------------------------------------------------------------------

LAYOUTS = (
    *("dense", "dense", "transposed", "channels_last", "sliced", "offset"),
    *("expanded", "negative"),
)


def lay_out(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same shape, and but for ``expanded`` the same numbers, otherwise in memory."""
    if how == "transposed":
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    if how == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if how == "sliced" and t.dim():
        room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
        room[..., 1::2] = t
        return room[..., 1::2]
    if how == "offset":
        room = torch.full((t.numel() + 3,), torch.nan, dtype=t.dtype)
        room[3:] = t.flatten()
        return room[3:].view(t.shape)
    if how == "expanded" and t.dim() and t.shape[0]:
        return t[:1].expand(t.shape)
    if how == "negative":
        return torch._neg_view(-t)
    return t


# ---- Arguments ---------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Call:
    """An operator's tensors (None where optional), the rest of its arguments, and gradients."""

    op: str
    tensors: tuple[torch.Tensor | None, ...]
    rest: dict[str, Any] = field(default_factory=dict)
    grads: tuple[torch.Tensor | None, ...] = ()  # of the outputs; None: it is not used
    wanted: tuple[bool, ...] = ()  # gradients of the tensors

    def __repr__(self) -> str:
        def short(t):
            return "None" if t is None else f"{list(t.shape)} {list(t.stride())}"

        tensors, grads = (", ".join(map(short, ts)) for ts in (self.tensors, self.grads))
        return f"{self.op} {self.dtype}: {tensors}; {self.rest}; {grads}; {self.wanted}"

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def wild(self) -> bool:
        """Whether anything is not finite."""
        given = (t for t in (*self.tensors, *self.grads) if t is not None)
        return not all(bool(t.isfinite().all()) for t in given)


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def call(draw, op, shapes, rest, outputs, optional=None, scales=None, lows=None, tame=None):
    """``shapes`` of the tensors, and of the outputs with whether each is wide; the one that may be
    left out; ``tame``: what must keep to a kind of numbers."""
    dtype, kinds = draw(dtypes), FINITE if draw(flags) else KINDS
    choices = draw(seeds)
    tensors = []
    for i, shape in enumerate(shapes):
        if i == optional and choices % 2:
            tensors.append(None)
            continue
        own = (tame or {}).get(i, kinds)
        scale, low = (scales or {}).get(i, 1.0), (lows or {}).get(i)
        tensors.append(tensor(draw(seeds), own, shape, dtype, scale, low))
    grads = tuple(
        tensor(draw(seeds), kinds, shape, _wide(dtype) if wide else dtype)
        for shape, wide in outputs
    )
    choices //= 2
    wanted = tuple(t is not None and choices >> 2 * i & 3 > 0 for i, t in enumerate(tensors))
    if not any(wanted):
        wanted = tuple(t is not None for t in tensors)
    choices >>= 16
    used = [choices >> 2 * i & 3 > 0 for i in range(len(grads))]
    made = Call(op, tuple(tensors), rest, grads, wanted)
    # Without a gradient nothing is multiplied by it; with one of 0, infinities would be.
    if not any(used) or all(used) or made.wild:
        return made
    grads = tuple(g if u else None for g, u in zip(grads, used, strict=True))
    return Call(op, tuple(tensors), rest, grads, wanted)


def rules(draw):
    return {
        "reconstruct": draw(one_of(True, True, False)),
        "penalty_share": draw(one_of(1.0, 0.0, 0.3)),
    }


@st.composite
def snf_linear(draw):
    batch = draw(one_of((), (1,), (4,), (2, 3), (0,), (2, 0)))
    d = draw(whole(1, 20))
    shapes = [(*batch, d), (d, d), (d, d), (d,)]
    outputs = [((*batch, d), False), (batch, True), (batch, True)]
    scales = {1: d**-0.5, 2: d**-0.5}
    return call(draw, "snf_linear", shapes, rules(draw), outputs, 3, scales)


widths = one_of(1, 2, 3, 4, 7, 16, 24)
sides = one_of(1, 3, 5)


@st.composite
def snf_conv2d(draw):
    groups, width, b = draw(whole(1, 3)), draw(widths), draw(whole(0, 4))
    c = groups * width
    h = draw(whole(1, 6 if c <= 12 else 3))
    w = draw(whole(1, 30 // h if c <= 12 else 2))
    kernels = [(draw(sides), draw(sides)) for _ in range(2)]
    rest = {"dilation": draw(whole(1, 3)), "groups": groups, "circular": draw(flags)}
    rest |= rules(draw)
    shapes = [(b, c, h, w), *((c, width, *k) for k in kernels), (c,)]
    scales = {i + 1: (width * k[0] * k[1]) ** -0.5 for i, k in enumerate(kernels)}
    outputs = [((b, c, h, w), False), ((b,), True), ((b,), True)]
    return call(draw, "snf_conv2d", shapes, rest, outputs, 3, scales)


@st.composite
def image_network(draw):
    b, c, t = draw(whole(0, 3)), draw(whole(1, 3)), draw(whole(1, 5))
    n = draw(one_of(1, 2, 5, 8, 9, 16, 33))
    h, w = draw(whole(1, 5)), draw(whole(1, 5))
    shapes = [(b, c, h, w), (n, c, 3, 3), (n,), (n, n, 1, 1), (n,), (t, n, 3, 3), (t,), (t, 1, 1)]
    scales = {1: (9 * c) ** -0.5, 3: n**-0.5, 5: (9 * n) ** -0.5, 7: 0.3}
    tame, outputs = {7: ("plain", "zeros")}, [((b, t, h, w), False)]
    return call(draw, "image_network", shapes, {}, outputs, None, scales, tame=tame)


@st.composite
def triangular_conv2d_solve(draw):
    b, c = draw(whole(0, 5)), draw(one_of(1, 2, 3, 9))
    most = 4 if c < 9 else 2
    h, w, kh, kw = draw(whole(1, most)), draw(whole(1, most)), draw(whole(1, 3)), draw(whole(1, 3))
    rest = {"upper": draw(flags)}
    shapes, outputs = [(b, c, h, w), (c, c, kh, kw)], [((b, c, h, w), False)]
    scales = {1: 0.3 / (c * kh * kw)}
    made = call(draw, "triangular_conv2d_solve", shapes, rest, outputs, None, scales)
    weight = made.tensors[1].clone()
    own = (weight[:, :, 0, 0] if rest["upper"] else weight[:, :, -1, -1]).diagonal()
    own.copy_(1 + 0.5 * own.clamp(-1, 1))
    at = draw(whole(0, 99))
    if at < c:
        own[at] = draw(one_of(0.0, -0.0, torch.inf))
    return Call(made.op, (made.tensors[0], weight), rest, made.grads, made.wanted)


events = one_of((), (1,), (7,), (33,), (2, 3), (3, 1, 4), (4, 3, 3), (0,), (2, 0, 3))


@st.composite
def elementwise(draw, op):
    shape, lows, rest = (draw(whole(0, 5)), *draw(events)), None, {}
    if op.startswith("smooth_leaky"):
        rest = {"alpha": draw(one_of(0.3, 0.01, 1.0, 1e-4))}
    elif op == "logit":
        rest = {"alpha": draw(one_of(0.0, 1e-6, 0.05)), "inverse": draw(flags)}
        lows = None if rest["inverse"] else {0: 0.0}
    scales = None if lows else {0: draw(one_of(1.0, 10.0))}
    outputs = [((shape[0],), True)]
    if op != "normal_log_prob":
        outputs.insert(0, (shape, False))
    return call(draw, op, [shape], rest, outputs, None, scales, lows)


@st.composite
def actnorm(draw):
    b, c, rest = draw(whole(0, 4)), draw(whole(1, 20)), draw(events)
    shape = (b, c, *rest)
    outputs, arguments = [(shape, False), ((b,), True)], {"inverse": draw(flags)}
    return call(draw, "actnorm", [shape, (c,), (c,)], arguments, outputs, None, {2: 2.0})


@st.composite
def affine_coupling(draw):
    b, c, rest = draw(whole(0, 4)), draw(whole(1, 6)), draw(events)
    shapes = [(b, c, *rest), (b, 2 * draw(whole(1, c)), *rest)]
    outputs, arguments = [(shapes[0], False), ((b,), True)], {"inverse": draw(flags)}
    return call(draw, "affine_coupling", shapes, arguments, outputs, None, {1: 3.0})


@st.composite
def rq_spline(draw):
    b, event, bins = draw(whole(0, 4)), draw(events), draw(whole(1, 6))
    sets = (*draw(one_of((), (1,), (b,))), *event)
    shapes = [(b, *event), (*sets, bins), (*sets, bins), (*sets, bins - 1)]
    bound = draw(one_of(10.0, 1.0, 0.1))
    outputs = [((b, *event), False), ((b,), True)]
    arguments = {"tail_bound": bound, "inverse": draw(flags)}
    return call(draw, "rq_spline", shapes, arguments, outputs, None, {0: 0.7 * bound})


@st.composite
def debias(draw, op):
    dtype, p = draw(one_of(torch.float32, torch.float64)), draw(whole(1, 4))
    if op == "debias_linear":
        d = draw(whole(1, 12))
        shape, kernels, rest, fan_in = (p, d), [(d, d)] * 2, {}, d
    else:
        groups, width = draw(whole(1, 2)), draw(one_of(1, 2, 3, 4, 16))
        sizes = [(draw(one_of(1, 3)), draw(one_of(1, 3))) for _ in range(2)]
        shape = (p, groups * width, draw(whole(1, 5)), draw(whole(1, 4)))
        kernels = [(groups * width, width, *s) for s in sizes]
        rest = {"dilation": draw(whole(1, 2)), "groups": groups, "circular": draw(flags)}
        fan_in = width * 9
    signs = tensor(draw(seeds), ("plain",), shape, dtype)
    signs = torch.where(signs > 0, 1, -1).to(signs)
    weights = [tensor(draw(seeds), KINDS, k, dtype, 0.7 * fan_in**-0.5) for k in kernels]
    scales = draw(one_of((1.0,), (0.5, 1.5), (1.5, 1.0, 0.5)))
    rest |= {"scales": list(scales), "share": draw(one_of(1.0, 0.5))}
    return Call(op, (signs, *weights), rest)


CALLS = {
    "snf_linear": snf_linear(),
    "snf_conv2d": snf_conv2d(),
    "image_network": image_network(),
    "triangular_conv2d_solve": triangular_conv2d_solve(),
    "rq_spline": rq_spline(),
    "smooth_leaky_relu": elementwise("smooth_leaky_relu"),
    "smooth_leaky_relu_inverse": elementwise("smooth_leaky_relu_inverse"),
    "logit": elementwise("logit"),
    "normal_log_prob": elementwise("normal_log_prob"),
    "actnorm": actnorm(),
    "affine_coupling": affine_coupling(),
    "debias_linear": debias("debias_linear"),
    "debias_conv2d": debias("debias_conv2d"),
}
