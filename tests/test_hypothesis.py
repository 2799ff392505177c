"""Sums of products against the reference, on whatever can be drawn.

``SNF_EXAMPLES=20000`` draws so many for each operator; the rule is in ``agreement.py``.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from agreement import Rule, agree, precision, tolerance
from conftest import needs_native
from drawn_calls import large, native, nothing, reference
from hypothesis import given
from strategies import CALLS, drawn

import snf_ext

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def compare(call, names, got, exact, size, reach, units):
    """``names`` of the outputs, then of the gradients."""
    # Where padding meets an infinite weight, an infinity may become NaN too.
    kernels = call.tensors[1::2] if call.op == "image_network" else call.tensors[1:3]
    is_large = large(call) or not all(bool(t.isfinite().all()) for t in kernels if t is not None)
    for name, g, e, s, r in zip(names, got, exact, size, reach, strict=True):
        if g is None or e is None:
            continue
        limit = torch.finfo(g.dtype).max / 8
        rule = Rule(units.get(name, ()), not name.startswith("d"), is_large)
        agree(name, g, e, tolerance(s, call.dtype, g.dtype), r < limit, rule)


# ---- The layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["snf_linear", "snf_conv2d"])
def test_layers(op):
    @drawn
    @given(CALLS[op])
    def check(call):
        if nothing(call):
            return
        outputs, grads = native(call)
        assert not outputs[1].any()
        got = [outputs[0], outputs[2], *grads]
        wild, dtype = call.wild, call.dtype
        zeros = [torch.zeros_like(o) for o in outputs]
        used = [z if g is None else g for z, g in zip(zeros, call.grads, strict=True)]

        def of(kind):
            mode = oracle.Mode(kind, dtype, wild)
            x, *others = call.tensors
            dz, g, q = used
            rest = dict(call.rest)
            rule = {k: rest.pop(k) for k in ("reconstruct", "penalty_share")}
            rule["share"] = rule.pop("penalty_share")
            if op == "snf_linear":
                x, dz = (t.reshape(-1, t.shape[-1]) for t in (x, dz))
                layer = oracle.Linear(mode)
            else:
                layer = oracle.Conv2d(mode, tuple(x.shape[2:]), **rest)
            results = list(oracle.layer(layer, x, *others, dz, g.flatten(), q.flatten(), **rule))
            for i, like in ((0, outputs[0]), (1, outputs[2]), (2, outputs[0])):
                results[i] = results[i].reshape(like.shape)
            return results, mode.peak

        exact, _ = of(oracle.EXACT)
        size, peak = of(oracle.SIZE)
        may_overflow = wild or not peak < torch.finfo(dtype).max / 8
        reach = of(oracle.REACH)[0] if may_overflow else size
        names = ("z", "recon", "dx", "dweight", "dweight_inv", "dbias")
        units = {} if op == "snf_linear" else {"dweight": (2, 3), "dweight_inv": (2, 3)}
        compare(call, names, got, exact, size, reach, units)
        if not wild:  # the oracle itself
            outputs, grads = reference(call, torch.float64)
            theirs = [outputs[0], outputs[2], *grads]
            for name, a, b, s in zip(names, theirs, exact, size, strict=True):
                if a is not None and b is not None:
                    assert ((a - b).abs() <= 1e-13 * s).all(), f"the reference's {name}"

    check()


# ---- Others that are sums of products ----------------------------------------------------------


@drawn
@given(CALLS["image_network"])
def test_image_network(call):
    if nothing(call):
        return
    (y,), grads = native(call)
    (exact,), exact_grads = reference(call, torch.float64)
    mode = oracle.Mode(oracle.SIZE, call.dtype, wild=False)
    leaves = [
        (t.detach().double() if i == 7 else t.detach().double().abs()).requires_grad_()
        for i, t in enumerate(call.tensors)
    ]
    size, first, second = oracle.network(mode, *leaves)
    sizes = [None] * 8
    if call.grads[0] is not None:
        dy = call.grads[0].double().abs()
        sizes = [g.abs() for g in torch.autograd.grad(size, leaves, dy)]
    # A hidden channel may be on or off within rounding of 0, and where it overflows (y shows that).
    limit = torch.finfo(torch.float32).max / 8
    nothing_at_all = torch.finfo(call.dtype).tiny  # is the size where all terms are 0
    plain = oracle.Mode(oracle.EXACT, call.dtype, wild=False)
    _, at_first, at_second = oracle.network(plain, *(t.detach() for t in call.tensors))
    near = [
        ((a.abs() <= tolerance(s, call.dtype, torch.float32)) & (s > 8 * nothing_at_all)).any()
        or (s > limit).any()
        for a, s in ((at_first, first.detach()), (at_second, second.detach()))
    ]
    big = mode.peak >= limit or any(s is not None and bool((s >= 1e30).any()) for s in sizes)
    # Padding is multiplied by infinite weights here and there.
    plain_kernels = all(bool(call.tensors[i].isfinite().all()) for i in (1, 3, 5))
    unsure = torch.inf if big or not plain_kernels else 0
    names = ["y", *(f"d{n}" for n in ("x", "w1", "b1", "w2", "b2", "w3", "b3", "logs"))]
    compare(call, names[:1], [y], [exact], [size.detach()], [size.detach() + unsure], {})
    if any(near):
        return
    units = {"dw1": (2, 3), "dw3": (2, 3)}
    for name, g, e, s in zip(names[1:], grads, exact_grads, sizes, strict=True):
        if s is not None:
            compare(call, [name], [g], [e], [s], [s + unsure], units)


@drawn
@given(CALLS["triangular_conv2d_solve"])
def test_triangular_conv2d_solve(call):
    if nothing(call):
        return
    (x,), grads = native(call)
    exact = oracle.substitution(oracle.Mode(oracle.EXACT), *call.tensors, **call.rest)
    mode = oracle.Mode(oracle.SIZE, call.dtype)
    size = oracle.substitution(mode, *call.tensors, **call.rest)
    clipped = oracle.Mode(oracle.REACH, call.dtype)
    reach = oracle.substitution(clipped, *call.tensors, **call.rest)
    compare(call, ["x"], [x], [exact], [size], [reach], {})
    if call.wild or call.grads[0] is None or not exact.isfinite().all():
        return
    _, exact_grads = reference(call, torch.float64)
    weight = call.tensors[1]
    turned = snf_ext.reference.convolution.flip(weight)

    def sizes(mode, of_x):
        of_z = oracle.substitution(mode, call.grads[0], turned, not call.rest["upper"])
        return [of_z, mode.stage(of_z.sum() * of_x.amax()).expand(weight.shape)]

    names = ["dz", "dweight"]
    compare(call, names, grads, exact_grads, sizes(mode, size), sizes(clipped, reach), {})


@pytest.mark.parametrize("op", ["debias_linear", "debias_conv2d"])
def test_debias(op):
    @drawn
    @given(CALLS[op])
    def check(call):
        (gradient, growth), _ = native(call)
        (exact, exact_growth), _ = reference(call, torch.float64)
        assert growth < 1 or not gradient.any()
        v, w, r = (t.detach().double() for t in call.tensors)
        rest, eps = dict(call.rest), precision(call.dtype)
        scales, share = rest.pop("scales"), rest.pop("share")
        mode = oracle.Mode(oracle.SIZE, call.dtype, wild=False)
        if op == "debias_linear":
            of = oracle.Linear(mode)
        else:
            of = oracle.Conv2d(mode, tuple(v.shape[2:]), **rest)
        power, series, u = v.abs(), v, 0
        for scale in scales:
            denominator = series.norm()
            power = power + of.apply(w.abs(), of.apply(r.abs(), power))
            series = series - of.apply(w, of.apply(r, series))
            u = u + scale * of.apply(r.abs(), power)
        size = share / len(v) * of.outer(v.abs(), u, w)
        # How much rounding is amplified: what is divided by may be little else.
        lost = FUZZ * eps * (power.norm() / denominator).item()
        overflows = power.norm().square() > torch.finfo(call.dtype).max / 8
        if overflows or not lost < 1e-2:
            return
        assert abs(growth - exact_growth) <= lost * (1 + exact_growth), "growth"
        if abs(exact_growth - 1) <= lost * (1 + exact_growth):
            return  # zeros, or an estimate: either is right
        agree(
            "gradient", gradient, exact, FACTOR_OF_SERIES * eps * size + 1e-30, size < 1e30, Rule()
        )

    check()


FUZZ = 1000
FACTOR_OF_SERIES = 256
