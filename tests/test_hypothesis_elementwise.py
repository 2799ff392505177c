"""Element-wise operators and the spline against the reference, on whatever can be drawn.

``SNF_EXAMPLES=20000`` draws so many for each operator; the rule is in ``agreement.py``.
"""

from __future__ import annotations

import functools

import pytest
import torch
from agreement import FACTOR, Rule, agree, precision, tolerance
from conftest import needs_native
from drawn_calls import large, native, nothing, reference
from hypothesis import given
from strategies import CALLS, Call, drawn

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


# ---- Element by element ------------------------------------------------------------------------


def sizes_of_elementwise(call):
    """Of the terms of outputs and gradients; a list for each operator."""
    tensors = [t.detach().double() for t in call.tensors]
    x = tensors[0]
    grads = [None if g is None else g.detach().double() for g in call.grads]
    a = call.rest.get("alpha")
    inverse = call.rest.get("inverse", False)

    def per_sample(t):
        return t.flatten(1).sum(1) if t.dim() > 1 else t

    if call.op == "normal_log_prob":
        g = _column(grads[0], x)
        return [per_sample(x.square() / 2 + 0.92), (g * x).abs()]
    dy, g = _zeros(grads[0], x), _column(grads[1], x)
    dy, g = dy.abs(), g.abs()
    if call.op == "smooth_leaky_relu":
        s = a + (1 - a) * torch.sigmoid(x)
        y = a * x.abs() + (1 - a) * torch.nn.functional.softplus(x)
        return [y, per_sample(1 + s.log().abs()), dy * s + g]
    if call.op == "smooth_leaky_relu_inverse":
        root = reference(call, torch.float64)[0][0].abs()
        steep = 1 + root.clamp(max=60)
        return [1 + root, per_sample(steep * (1 - torch.tensor(a).log())), (dy + g) / a * steep]
    if call.op == "logit" and inverse:
        s, inner = torch.sigmoid(x), 1 - 2 * a
        logs = torch.nn.functional.softplus(x) + torch.nn.functional.softplus(-x)
        # The reference's own s (1 - s) loses digits, in float64 too.
        slope = s / inner * (torch.sigmoid(-x) + 1e-15 / precision(call.dtype))
        return [(s + a) / inner, per_sample(logs + 1), dy * slope + g]
    if call.op == "logit":
        inner = 1 - 2 * a
        s, rest = a + inner * x, a + inner * (1 - x)
        lost = (a + inner * x.abs()) / s.abs() + (a + inner * (1 + x.abs())) / rest.abs()
        logs = s.log().abs() + rest.log().abs()
        slopes = inner / s.abs() + inner / rest.abs()
        over = torch.where(slopes < 1e37, 0, torch.inf) if call.dtype != torch.float64 else 0
        dx = (dy + g) * slopes * (1 + lost) + 0 * over
        return [logs + lost, per_sample(logs + lost + 1), dx]
    if call.op == "actnorm":
        rest = (1,) * (x.dim() - 2)
        c, s = (t.view(-1, *rest) for t in tensors[1:])
        pixels = x[0, 0].numel() if len(x) else 1
        scale = s.exp() if inverse else (-s).exp()
        dx = dy * scale
        moved = x.abs() if inverse else x.abs() + c.abs()
        y = moved * scale + (c.abs() if inverse else 0)
        total = (pixels * s.abs().sum()).expand(len(x))
        others = [d for d in range(x.dim()) if d != 1]
        shift = (dy if inverse else dx).expand(x.shape).sum(others)
        return [y, total, dx, shift, (dx * moved + g).expand(x.shape).sum(others)]
    params = tensors[1]
    raw, t = params[:, ::2], params[:, 1::2].abs()
    kept = x.shape[1] - raw.shape[1]
    logs = 2 * torch.tanh(raw / 2)
    scale = (-logs).exp() if inverse else logs.exp()
    v, d = x[:, kept:].abs(), dy[:, kept:]
    y = (v + t) * scale if inverse else v * scale + t
    of_raw = d * scale * (v + t if inverse else v) + g
    of_t = d * scale if inverse else d
    of_params = torch.stack((of_raw, of_t), 2).flatten(1, 2)
    first, d_first = x[:, :kept].abs(), dy[:, :kept]
    return [
        torch.cat((first, y), 1),
        per_sample(logs.abs() + 1),
        torch.cat((d_first, d * scale), 1),
        of_params,
    ]


def _zeros(t, like):
    return torch.zeros_like(like) if t is None else t


def _column(t, like):
    rest = (1,) * (like.dim() - 1)
    return torch.zeros((1, *rest), dtype=like.dtype) if t is None else t.view(-1, *rest)


NAMES = {
    "actnorm": ("y", "log_abs_det", "dx", "dshift", "dlog_scale"),
    "affine_coupling": ("y", "log_abs_det", "dx", "dparams"),
    "normal_log_prob": ("log_prob", "dz"),
}


@pytest.mark.parametrize(
    "op",
    [
        *("smooth_leaky_relu", "smooth_leaky_relu_inverse", "logit", "normal_log_prob"),
        *("actnorm", "affine_coupling"),
    ],
)
def test_elementwise(op):
    @drawn
    @given(CALLS[op])
    def check(call):
        if nothing(call):
            return
        outputs, grads = native(call)
        exact, exact_grads = reference(call, torch.float64)
        plain, plain_grads = reference(call)
        if op == "smooth_leaky_relu_inverse":
            outputs, exact, plain = outputs[:2], exact[:2], plain[:2]
        names = NAMES.get(op, ("y", "log_abs_det", "dx"))
        rows = zip(
            names,
            [*outputs, *grads],
            [*exact, *exact_grads],
            [*plain, *plain_grads],
            sizes_of_elementwise(call),
            strict=True,
        )
        for name, got, e, same, size in rows:
            if got is None:
                continue
            # The reference's outputs may not depend on all that the native ones are said to.
            e, same = (torch.zeros_like(got) if t is None else t for t in (e, same))
            e, same = e.double(), same.double()
            # Finite where the reference is, in this dtype and in float64.
            sure = same.isfinite() & e.isfinite() & (size < torch.finfo(got.dtype).max / 8)
            size = torch.where(size.isfinite(), size, e.abs())
            rule = Rule((), not name.startswith("d"), large(call))
            agree(name, got, e, tolerance(size, call.dtype, got.dtype), sure, rule)

    check()


# ---- The spline --------------------------------------------------------------------------------


@drawn
@given(CALLS["rq_spline"])
def test_rq_spline(call):
    if nothing(call):
        return
    outputs, grads = native(call)
    exact, exact_grads = reference(call, torch.float64)
    plain, plain_grads = reference(call)
    bound, eps = call.rest["tail_bound"], precision(call.dtype)
    x = call.tensors[0].detach().double()
    # Rounding moves knots, and so the place of an element: what that changes is allowed.
    moved = []
    for shift in (-1, 1):
        at = Call(
            call.op,
            (x + shift * 64 * eps * bound, *(t.double() for t in call.tensors[1:])),
            call.rest,
            tuple(None if g is None else g.double() for g in call.grads),
            call.wanted,
        )
        moved.append(reference(at, torch.float64))
    for i, name in enumerate(("y", "log_abs_det")):
        e, got, same = exact[i], outputs[i], plain[i].double()
        change = sum((m[i] - e).abs().nan_to_num(0, 0) for m, _ in moved)
        # Slopes are ratios of differences of knots, which lie a thousandth of the interval apart.
        terms = bound + e.abs() if i == 0 else x[:1].numel() * (10 + 500.0)
        allowed = 8 * (same - e).abs().nan_to_num(0, 0, 0) + change
        allowed = allowed + tolerance(torch.ones_like(e) * terms, call.dtype, got.dtype)
        sure = same.isfinite() & e.isfinite() & (e.abs() < torch.finfo(got.dtype).max / 8)
        agree(name, got, e, allowed, sure, Rule((), True, False))
    extreme = large(call) or call.wild
    # Sets, by numbers alone: the reference drops a NaN where it cuts a slope off.
    reached_by_numbers = functools.reduce(
        torch.logical_and,
        (t.isfinite().all(-1, keepdim=True) for t in call.tensors[1:]),
        torch.tensor(
            not large(call) and all(g.isfinite().all() for g in call.grads if g is not None)
        ),
    )
    changes = [
        sum(
            (m[i] - e).abs().nan_to_num(0, 0, 0).max() if m[i] is not None and m[i].numel() else 0
            for _, m in moved
        )
        for i, e in enumerate(exact_grads)
    ]
    for i, name in enumerate(("dx", "dwidths", "dheights", "dderivatives")):
        got, e, same = grads[i], exact_grads[i], plain_grads[i]
        if got is None:
            continue
        e, same = (torch.zeros_like(got) if t is None else t for t in (e, same))
        units = () if i == 0 else (e.dim() - 1,)
        if i > 0:
            # Of elements outside, autograd multiplies a set's NaN by 0; they have no gradient.
            inside = (x.abs() <= bound)[..., None]
            own = inside.dim() == e.dim() and inside.shape[0] == e.shape[0]
            inside = inside if own else inside.all(0)
            e = torch.where(inside.expand(e.shape), e, torch.where(e.isfinite(), e, got.double()))
        e, same = e.double(), same.double()
        scale = e.abs().nan_to_num(0, 0, 0).max() if e.numel() else torch.zeros(())
        allowed = 8 * (same - e).abs().nan_to_num(0, 0, 0).max() if e.numel() else scale
        given = sum(g.double().abs().max() for g in call.grads if g is not None)
        rounding = FACTOR * eps * (scale + given / bound)
        allowed = torch.inf if extreme else allowed + changes[i] + rounding
        limit = torch.finfo(got.dtype).max / 8  # rounding of huge gradients may reach it by itself
        sure = same.isfinite() & e.isfinite() & (e.abs() < limit) & (rounding < limit)
        if i > 0:
            sure = sure & reached_by_numbers
        tiny = torch.finfo(got.dtype).tiny
        agree(name, got, e, torch.full_like(e, allowed + tiny), sure, Rule(units))
