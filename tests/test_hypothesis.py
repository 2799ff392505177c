"""Every operator against the reference, on whatever shapes, layouts, dtypes and numbers there are.

``SNF_EXAMPLES=20000`` draws so many for each operator; the rule is in ``agreement.py``.
"""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from agreement import Rule, agree, precision, tolerance
from conftest import needs_native
from hypothesis import given
from strategies import CALLS, Call, drawn

import snf_ext

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def run(call: Call, function, dtype=None):
    """Outputs, and a gradient or None for each tensor."""
    leaves = [
        None if t is None else (t if dtype is None else t.detach().to(dtype)).requires_grad_(wanted)
        for t, wanted in zip(
            (None if t is None else t.detach() for t in call.tensors),
            call.wanted or (False,) * len(call.tensors),
            strict=True,
        )
    ]
    outputs = function(*leaves, **call.rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [t for t in leaves if t is not None and t.requires_grad]
    pairs = [
        (o, g if dtype is None else g.to(o.dtype))
        for o, g in zip(outputs, call.grads, strict=False)  # a count of iterations has none
        if g is not None and o.requires_grad
    ]
    found = iter(())
    if pairs and used:
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], used, [g for _, g in pairs], materialize_grads=True
            )
        )
    else:
        used = []
    grads = [next(found) if t is not None and t.requires_grad and used else None for t in leaves]
    return [o.detach() for o in outputs], grads


def native(call):
    return run(call, getattr(torch.ops.snf_ext, call.op))


def nothing(call: Call) -> bool:
    """Whether there are no elements: sums of nothing are 0, or NaN where 0 meets infinity."""
    if call.tensors[0].numel():
        return False
    outputs, grads = native(call)
    for t in (*outputs, *grads):
        assert t is None or not t.nan_to_num(0 if call.wild else 1).any()
    return True


def reference(call, dtype=None):
    return run(call, getattr(snf_ext.reference, call.op), dtype)


def large(call: Call) -> bool:
    bound = 1e3 if call.dtype == torch.float16 else 1e10
    given = (t for t in (*call.tensors, *call.grads) if t is not None and t.numel())
    return any(bool(((t.abs() > bound) & t.isfinite()).any()) for t in given)


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
    # A hidden channel within rounding of 0 may be on or off.
    plain = oracle.Mode(oracle.EXACT, call.dtype, wild=False)
    _, at_first, at_second = oracle.network(plain, *(t.detach() for t in call.tensors))
    near = [
        ((a.abs() <= tolerance(s, call.dtype, torch.float32)) & (a != 0)).any()
        for a, s in ((at_first, first.detach()), (at_second, second.detach()))
    ]
    big = mode.peak >= torch.finfo(torch.float32).max / 8 or any(
        s is not None and bool((s >= 1e30).any()) for s in sizes
    )
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
            call.op, (x + shift * 64 * eps * bound, *(t.double() for t in call.tensors[1:])),
            call.rest,
        )  # fmt: skip
        moved.append(reference(at, torch.float64)[0])
    for i, name in enumerate(("y", "log_abs_det")):
        e, got, same = exact[i], outputs[i], plain[i].double()
        change = sum((m[i] - e).abs().nan_to_num(0, 0) for m in moved)
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
        allowed = allowed + (2e-2 if eps > 1e-10 else 1e-8) * scale + 64 * eps * given / bound
        if extreme:
            allowed = allowed + torch.inf
        sure = same.isfinite() & e.isfinite() & (e.abs() < torch.finfo(got.dtype).max / 8)
        if i > 0:
            sure = sure & reached_by_numbers
        agree(name, got, e, (allowed + torch.finfo(got.dtype).tiny).expand_as(e), sure, Rule(units))
