"""rq_spline: values and gradients against numpy, extremes, and the rules of a torch operator."""

from __future__ import annotations

import math
from decimal import Decimal

import ground_truth_spline
import numpy as np
import pytest
import torch
from conftest import needs_native
from torch.profiler import ProfilerActivity, profile

import snf_ext
from snf_ext import ops

BOUND = 3.0
# Event, batch, bins, one set an element: odd sizes, several samples a tile, several tiles.
SHAPES = [
    ((6,), 4, 5, False),
    ((2, 3), 5, 1, False),
    ((7,), 3, 8, True),
    ((), 9, 4, False),
    ((), 5, 3, True),
    ((67,), 2, 3, False),
    ((3, 23), 2, 2, True),
]


def ids(value):
    return str(value).replace(" ", "")


def make(event, batch, bins, own, dtype=torch.float64, device="cpu", spread=1.0):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = (batch, *event) if own else event
    x = 2 * draw(batch, *event)
    parameters = [spread * draw(*lead, n) for n in (bins, bins, bins - 1)]
    return [t.to(device, dtype) for t in (x, *parameters)]


def loss_gradients(tensors, inverse=False, weights=(1.0, 1.0)):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, log_abs_det = ops.rq_spline(*leaves, BOUND, inverse)
    loss = weights[0] * 0.5 * y.double().square().sum() - weights[1] * log_abs_det.double().sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [t.detach() for t in (y, log_abs_det, *grads)]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_values(shape, inverse, backend, device):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        tensors = make(*shape, dtype=dtype, device=device)
        y, log_abs_det = ops.rq_spline(*tensors, BOUND, inverse)
        assert y.dtype == log_abs_det.dtype == dtype
        arrays = [t.cpu().double().numpy() for t in tensors]
        want = ground_truth_spline.rq_spline(*arrays, BOUND, inverse)
        for got, true in zip((y, log_abs_det), want, strict=True):
            np.testing.assert_allclose(got.cpu(), true, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_gradcheck(shape, inverse, backend, device):
    tensors = make(*shape, device=device)
    if tensors[0].numel() * tensors[1].numel() > 10_000:
        tensors = [t[..., :3, :] if i else t[..., :3] for i, t in enumerate(tensors)]
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: ops.rq_spline(*t, BOUND, inverse), leaves)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", [*SHAPES, ((130,), 140, 5, False)], ids=ids)
@needs_native
def test_gradients_of_both_backends_agree(shape, inverse, device):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-5)):
        tensors = make(*shape, dtype=dtype, device=device)
        ours = loss_gradients(tensors, inverse)
        with snf_ext.use_backend("reference"):
            true = loss_gradients([t.double() for t in tensors], inverse)
            plain = loss_gradients(tensors, inverse)
        for got, want, theirs in zip(ours, true, plain, strict=True):
            if want.numel():
                # Where the slope is 1e-3, rounding the input alone costs three digits.
                limit = tolerance * (1 + want.abs().max()) + 2 * (theirs - want).abs().max()
                assert (got - want).abs().max() < limit


def test_parity(shared, backend, device):
    with np.load(shared / "parity" / "spline.npz", allow_pickle=False) as file:
        data = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
    leaves = [data[k].clone().requires_grad_() for k in ("x", "w", "h", "d")]
    y, log_abs_det = ops.rq_spline(*leaves, 10.0)
    loss = 0.5 * y.square().sum() - log_abs_det.sum()
    grads = torch.autograd.grad(loss, leaves)
    x_rec, _ = ops.rq_spline(y, *leaves[1:], 10.0, inverse=True)
    for got, key in zip(
        (y, log_abs_det, x_rec, *grads),
        ("y", "logdet", "x_rec", "gx", "gw", "gh", "gd"),
        strict=True,
    ):
        assert (got - data[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_inverse_returns(own, dtype, tolerance, backend, device):
    x, *parameters = make((50,), 40, 6, own, dtype, device)
    y, forward = ops.rq_spline(x, *parameters, BOUND)
    back, inverse = ops.rq_spline(y, *parameters, BOUND, inverse=True)
    # Rounding y alone moves x by that over the slope, which falls below 1e-3 here.
    exact = x.double().requires_grad_()
    value, _ = ops.rq_spline(exact, *(p.double() for p in parameters), BOUND)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    error = (back - x).abs() / (1 + x.abs())
    assert (error[slope > 0.05] <= tolerance).all()
    assert (error * slope.clamp(max=1) <= tolerance / 10).all()
    assert ((forward + inverse).abs() <= 100 * tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
def test_finite_whatever_comes(size, inverse, dtype, backend, device):
    inside = [-BOUND, BOUND, 0.0, 1e-30, -2.999999, 2.999999, 1.5, -0.1]
    x = torch.tensor([inside, [1e4, -1e4, 1e30, -1e30, 3.1, -3.1, 0, 1]], device=device).to(dtype)
    _, *parameters = make((8,), 2, 6, False, dtype, device)
    tensors = [x, *(p * size for p in parameters)]
    for result in loss_gradients(tensors, inverse, (0.0, 1.0)):
        assert result.isfinite().all()
    y, _ = ops.rq_spline(*tensors, BOUND, inverse)
    assert torch.equal(y[1, :6], x[1, :6])
    assert (y[0].abs() <= BOUND).all()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_tails_are_exact(inverse, backend, device):
    special = [math.inf, -math.inf, math.nan, 3.0000002, -50.0]
    x = torch.tensor([special], device=device).requires_grad_()
    _, *parameters = make((5,), 1, 4, False, torch.float32, device)
    y, log_abs_det = ops.rq_spline(x, *(p.requires_grad_() for p in parameters), BOUND, inverse)
    assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    assert torch.equal(log_abs_det, torch.zeros_like(log_abs_det))
    (y.sum() + log_abs_det.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(not p.grad.any() for p in parameters)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_on_knots(inverse, backend, device):
    _, *parameters = make((1,), 1, 6, False, torch.float64, device)
    raw = (parameters[1] if inverse else parameters[0])[0].cpu().numpy()
    ends = torch.tensor(ground_truth_spline.knots(raw, BOUND), device=device)[:, None]
    y, logs = ops.rq_spline(ends, *parameters, BOUND, inverse)
    other = (parameters[0] if inverse else parameters[1])[0].cpu().numpy()
    np.testing.assert_allclose(y[:, 0].cpu(), ground_truth_spline.knots(other, BOUND), atol=1e-12)
    slope = np.log(ground_truth_spline.slopes(parameters[2][0].cpu().numpy()))
    np.testing.assert_allclose(logs.cpu(), -slope if inverse else slope, atol=1e-11)


def test_the_inverse_beside_a_steep_knot(backend, device):
    """1 - t is too small for a difference. Two equal bins, whose slopes go from 1 to 1e15."""
    u, steep, half = [Decimal(n).scaleb(-16) for n in (3, 70, 20_000)], Decimal(10) ** 15, 10
    below = [1 + (steep - 1) * (1 - n) * n for n in u]
    heights = [(1 - n) / b for n, b in zip(u, below, strict=True)]
    slopes = [
        (steep * (1 - n) ** 2 + 2 * (1 - n) * n + n**2) / b**2
        for n, b in zip(u, below, strict=True)
    ]
    y = torch.tensor([[float(half * (v - 1))] for v in heights], dtype=torch.float64, device=device)
    zeros = torch.zeros(1, 2, dtype=torch.float64, device=device)
    _, log_det = ops.rq_spline(y, zeros, zeros, zeros[:, 1:] + math.inf, half, inverse=True)
    want = torch.tensor([-float(slope.ln()) for slope in slopes], dtype=torch.float64)
    torch.testing.assert_close(log_det.cpu(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("event", [(4,), (0,)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_empty(own, event, backend, device):
    batch = 3 if event == (0,) else 0
    x, *parameters = (t.requires_grad_() for t in make(event, batch, 4, own, device=device))
    y, log_abs_det = ops.rq_spline(x, *parameters, BOUND)
    assert y.shape == x.shape
    assert torch.equal(log_abs_det, torch.zeros_like(log_abs_det))
    assert log_abs_det.shape == (batch,)
    (y.sum() + log_abs_det.sum()).backward()
    assert all(p.grad.shape == p.shape and not p.grad.any() for p in parameters)


def test_one_set_with_a_batch_dimension(backend, device):
    x, *parameters = make((6,), 4, 5, False, device=device)
    plain = loss_gradients([x, *parameters])
    other = loss_gradients([x, *(p[None] for p in parameters)])
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b.reshape(a.shape))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_non_contiguous(own, backend, device):
    tensors = make((3, 5), 4, 5, own, device=device)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in tensors]
    for a, b in zip(loss_gradients(tensors), loss_gradients(strided), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_same_bits_for_any_number_of_threads(own):
    tensors = make((200,), 150, 5, own, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_gradients(tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "widths", "heights", "derivatives"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_only_what_is_needed(own, wanted, backend, device):
    tensors = make((9,), 4, 5, own, device=device)
    together = loss_gradients(tensors)[2 + wanted]
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y, log_abs_det = ops.rq_spline(*leaves, BOUND)
    loss = 0.5 * y.square().sum() - log_abs_det.sum()
    (alone,) = torch.autograd.grad(loss, leaves[wanted])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", [0, 1], ids=["y", "log_abs_det"])
def test_each_output_alone(output, backend, device):
    tensors = make((9,), 4, 5, False, device=device)
    weights = [0.0, 0.0]
    weights[output] = 1.0
    want = loss_gradients(tensors, weights=weights)[2:]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = ops.rq_spline(*leaves, BOUND)[output]
    loss = -out.sum() if output else 0.5 * out.square().sum()
    got = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, backend, device):
    tensors = make((9,), 4, 5, False, dtype, device)
    ours, true = loss_gradients(tensors), loss_gradients([t.float() for t in tensors])
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    assert torch.equal(ours[0], true[0].to(dtype))
    assert torch.equal(ours[1], true[1])
    for a, b in zip(ours[2:], true[2:], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_autocast_computes_in_float32(backend, device):
    tensors = make((9,), 4, 5, False, torch.float32, device)
    plain = loss_gradients(tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = loss_gradients(tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_autocast_widens(backend):
    half = make((9,), 4, 5, False, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_abs_det = ops.rq_spline(*half, BOUND)
    assert y.dtype == log_abs_det.dtype == torch.float32


@needs_native
def test_double_backward_is_refused_natively():
    with snf_ext.use_backend("native"):
        leaves = [t.requires_grad_() for t in make((4,), 3, 5, False)]
        y, _ = ops.rq_spline(*leaves, BOUND)
        (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"rq_spline .*use_backend\(.reference.\)"):
            grad.sum().backward()


@needs_native
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_opcheck(own, device_or_meta):
    tensors = make((4,), 3, 5, own, torch.float32, device_or_meta)
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.snf_ext.rq_spline.default, (*leaves, BOUND))
    grads = (torch.ones_like(tensors[0]), torch.ones(3, device=device_or_meta))
    for mask in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(
            torch.ops.snf_ext.rq_spline_backward.default, (*grads, *tensors, BOUND, False, mask)
        )


@needs_native
def test_few_dispatched_operators():
    with snf_ext.use_backend("native"):
        leaves = [t.requires_grad_() for t in make((50,), 20, 5, False, torch.float32)]
        grads = (torch.ones(20, 50), torch.ones(20))

        def step():
            return torch.autograd.grad(ops.rq_spline(*leaves, BOUND), leaves, grads)

        step()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
    names = [e.name for e in seen.events() if e.name.startswith(("aten::", "snf_ext::"))]
    assert len(names) <= 10, names


def bad_arguments():
    x, w, h, d = make((6,), 4, 5, False, torch.float32)
    own = "(shared by the batch) or [4, 6] (one set an element)"
    yield (x.long(), w, h, d, 1.0), TypeError, "x must be a floating-point tensor; got torch.int64"
    yield (x[0, 0], w, h, d, 1.0), ValueError, "x must have shape [B, ...]; got []"
    yield (x, w[..., :0], h, d, 1.0), ValueError, "widths must have 1 to 999 bins in its last"
    yield (
        (x, w[:3], h, d, 1.0),
        ValueError,
        f"widths must have shape [..., K] with [...] = [6] {own}; got [3, 5]",
    )
    yield (
        (x, w, h[:, :4], d, 1.0),
        ValueError,
        "heights must have the shape of widths, [6, 5]; got [6, 4]",
    )
    yield (
        (x, w, h, h, 1.0),
        ValueError,
        "derivatives must have shape [..., K - 1] = [6, 4]; got [6, 5]",
    )
    for bound, said in ((0.0, "0.0"), (-1.5, "-1.5"), (math.inf, "inf"), (math.nan, "nan")):
        yield (
            (x, w, h, d, bound),
            ValueError,
            f"tail_bound must be in [1e-30, 1e30]; got {said}",
        )
    yield (
        (x, w.double(), h, d, 1.0),
        TypeError,
        "widths must have the dtype of x, torch.float32; got torch.float64",
    )


@pytest.mark.parametrize(("arguments", "error", "message"), list(bad_arguments()))
def test_bad_arguments(arguments, error, message, backend):
    with pytest.raises(error) as raised:
        ops.rq_spline(*arguments)
    assert message in str(raised.value)


@needs_native
@pytest.mark.skipif(snf_ext.build_info()["cuda"], reason="the build has CUDA kernels")
def test_cpu_only_build_explains_cuda_tensors():
    for name in ("rq_spline", "rq_spline_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"snf_ext::{name}", "CUDA")
