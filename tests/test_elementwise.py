"""The element-wise operators against numpy's formulas, and the rules of a torch operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import needs_native
from elementwise_table import ELEMENTWISE, leaky

import snf_ext
from snf_ext import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
IMAGES = [case for case in ELEMENTWISE if case.shapes[0] == (3, 4, 3, 5)]
ONE_EACH = [c for c in IMAGES if not any(a in c.name for a in ("0.01", "1.0", "0.0-", "-1-", "-4"))]
SMALL = [case for case in ELEMENTWISE if case.shapes[0] in ((3, 4, 3, 5), (5, 7))]


def ids(case):
    return case.name


def run(case, tensors, grads=None):
    """Outputs and gradients of everything."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = case.function(*leaves)
    grads = case.gradients(out) if grads is None else grads
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, grads)]


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        b = torch.as_tensor(b, dtype=torch.float64)
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.detach().cpu().double(), b, rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_equals_the_formula(case, dtype, backend, device):
    tensors = case.tensors(dtype, device)
    out = case.function(*tensors)
    assert [t.dtype for t in out] == [dtype] * len(out)
    # log s(x) and the inverse carry the rounding of x on, by up to 1 / alpha.
    slack = 20 if "inverse" in case.name or "logit" in case.name else 1
    close(out, case.truth(*tensors), slack * TOLERANCE[dtype])


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_gradcheck(case, backend):
    tensors = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.function, tensors)


@needs_native
@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_gradients_in_float32(case, device):
    tensors = case.tensors(torch.float32, device)
    grads = case.gradients(case.function(*tensors))
    with snf_ext.use_backend("reference"):
        want = run(case, [t.double() for t in tensors], [g.double() for g in grads])
    close(run(case, tensors, grads), [t.cpu() for t in want], 40 * TOLERANCE[torch.float32])


@needs_native
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_only_what_is_needed(case, device):
    tensors = case.tensors(torch.float32, device)
    out = case.function(*tensors)
    grads = case.gradients(out)
    together = run(case, tensors, grads)[len(out) :]
    for wanted, want in enumerate(together):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        (alone,) = torch.autograd.grad(case.function(*leaves), leaves[wanted], grads)
        torch.testing.assert_close(alone, want)


@needs_native
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_each_output_alone(case, device):
    tensors = case.tensors(torch.float64, device)
    grads = case.gradients(case.function(*tensors))
    for output in range(len(grads)):
        masked = [g if i == output else torch.zeros_like(g) for i, g in enumerate(grads)]
        want = run(case, tensors, masked)[len(grads) :]
        leaves = [t.clone().requires_grad_() for t in tensors]
        got = torch.autograd.grad(case.function(*leaves)[output], leaves, grads[output])
        close(got, [t.cpu() for t in want], 1e-13)


@needs_native
@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_same_bits_twice_and_for_any_number_of_threads(case):
    tensors = [
        t.repeat(40, *[1] * (t.dim() - 1)) if i == 0 or t.dim() > 1 else t
        for i, t in enumerate(case.tensors(torch.float32))
    ]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", IMAGES, ids=ids)
def test_half_precision_computes_in_float32(case, dtype, backend, device):
    tensors = case.tensors(dtype, device)
    out = case.function(*tensors)
    truth = case.truth(*tensors)
    assert out[-1].dtype == torch.float32
    close(out[-1:], truth[-1:], 1e-5)
    if len(out) == 2:
        assert out[0].dtype == dtype
        close(out[:1], truth[:1], torch.finfo(dtype).eps)
    grads = case.gradients(out)
    with snf_ext.use_backend("reference"):
        want = run(case, [t.double() for t in tensors], [g.double() for g in grads])
    got = run(case, tensors, grads)
    assert all(t.dtype == dtype for t in got[len(out) :])
    close(got[len(out) :], [t.cpu() for t in want[len(out) :]], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", IMAGES, ids=ids)
def test_autocast_computes_in_float32(case, backend, device):
    tensors = case.tensors(torch.float32, device)
    plain = run(case, tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = run(case, tensors)
        half = case.function(*(t.bfloat16() for t in tensors))
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert all(t.dtype == torch.float32 for t in half)


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_non_contiguous_and_channels_last(case, backend, device):
    tensors = case.tensors(torch.float64, device)
    plain = [t.cpu() for t in run(case, tensors)]
    grads = case.gradients(case.function(*tensors))

    def strided(t):
        return torch.stack([t, t + 1], -1)[..., 0]

    close(run(case, [strided(t) for t in tensors], [strided(g) for g in grads]), plain, 1e-13)
    if tensors[0].dim() == 4:
        last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        close(run(case, last), plain, 1e-13)


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_empty_batch(case, backend, device):
    tensors = [t[:0] if i == 0 or t.dim() > 1 else t for i, t in enumerate(case.tensors())]
    leaves = [t.to(device).requires_grad_() for t in tensors]
    out = case.function(*leaves)
    assert out[-1].shape == (0,)
    assert len(out) == 1 or out[0].shape == leaves[0].shape
    grads = torch.autograd.grad(sum(t.sum() for t in out), leaves)
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("case", [c for c in IMAGES if "coupling" not in c.name], ids=ids)
def test_empty_events(case, backend, device):
    x, *rest = case.tensors(torch.float32, device)
    leaves = [t.requires_grad_() for t in (x[..., :0], *rest)]
    out = case.function(*leaves)
    assert out[-1].tolist() == [0.0] * 3
    grads = torch.autograd.grad(sum(t.sum() for t in out), leaves)
    assert all(not g.any() for g in grads)


@needs_native
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_double_backward_is_refused_with_the_way_out(case):
    tensors = [t.requires_grad_() for t in case.tensors()]
    out = case.function(*tensors)
    loss = sum(t.square().sum() for t in out)
    (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    message = r"gradient is exact, but has no native second derivative.*use_backend"
    with pytest.raises(NotImplementedError, match=message):
        grad.sum().backward()


@needs_native
@pytest.mark.parametrize("case", ONE_EACH, ids=ids)
def test_opcheck(case, device_or_meta):
    tensors = case.tensors(torch.float32, device_or_meta)
    op = getattr(torch.ops.snf_ext, case.op).default
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in tensors), *case.rest))
    out = case.function(*tensors)
    grads = [torch.ones_like(t) for t in out]
    backward = getattr(torch.ops.snf_ext, f"{case.op}_backward").default
    masks = [[True] * len(tensors), [False] * (len(tensors) - 1) + [True], [True, False, False]]
    for mask in masks if len(tensors) > 1 else [None]:
        end = () if mask is None else (mask[: len(tensors)],)
        torch.library.opcheck(backward, (*grads, *tensors, *case.rest, *end))


def bad_arguments():
    x, images = torch.randn(3, 4), torch.randn(2, 4, 3, 3)
    floating = r"{} must be a floating-point tensor; got torch.int64"
    for name, rest in (("smooth_leaky_relu", (0.3,)), ("logit", (0.1,))):
        yield name, (x.long(), *rest), TypeError, floating.format("x")
        yield name, (x[0, 0], *rest), ValueError, r"x must have shape \[B, \.\.\.\]; got \[\]"
    yield "smooth_leaky_relu_inverse", (x.long(), 0.3), TypeError, floating.format("z")
    yield "normal_log_prob", (x.long(),), TypeError, floating.format("z")
    for alpha in (0.0, -1.0, 1.5, float("nan")):
        message = rf"alpha must be in \(0, 1\]; got {alpha:g}"
        yield "smooth_leaky_relu", (x, alpha), ValueError, message
        yield "smooth_leaky_relu_inverse", (x, alpha), ValueError, message
    message = r"alpha must be in \[0, 0\.5\); got 0\.5"
    yield "logit", (x, 0.5), ValueError, message
    c, params = torch.zeros(4), torch.zeros(2, 4, 3, 3)
    yield "actnorm", (images.long(), c, c), TypeError, floating.format("x")
    yield "actnorm", (c, c, c), ValueError, r"x must have shape \[B, C, \.\.\.\]; got \[4\]"
    message = r"must have shape \[C\] = \[4\]; got \[3\]"
    yield "actnorm", (images, c[:3], c), ValueError, "shift " + message
    yield "actnorm", (images, c, c[:3]), ValueError, "log_scale " + message
    message = r"shift must have the dtype of x, torch.float32; got torch.float64"
    yield "actnorm", (images, c.double(), c), TypeError, message
    message = r"log_scale must be on the device of x, cpu; got meta"
    yield "actnorm", (images, c, c.to("meta")), ValueError, message
    wanted = r"params must have shape \[B, 2T, \.\.\.\] with T from 1 to C, for x of \[2, 4, 3, 3\]"
    many = torch.zeros(2, 10, 3, 3)
    for bad in (params[:1], params[:, :3], params[:, :0], many, params[..., :2], params[..., 0]):
        got = str(list(bad.shape)).replace("[", r"\[").replace("]", r"\]")
        yield "affine_coupling", (images, bad), ValueError, f"{wanted}; got {got}"
    message = r"params must have the dtype of x, torch.float32; got torch.float64"
    yield "affine_coupling", (images, params.double()), TypeError, message


@pytest.mark.parametrize(("name", "arguments", "error", "message"), list(bad_arguments()))
def test_bad_arguments_in_the_same_words(name, arguments, error, message, backend):
    with pytest.raises(error, match=message):
        getattr(ops, name)(*arguments)


# ---- Extremes ----------------------------------------------------------------------------------

EXTREMES = [0.0, 1e-30, 1e-6, 0.5, 3.0, 20.0, 90.0, 1e4, 1e30]


def extremes(dtype):
    values = torch.tensor(EXTREMES, dtype=torch.float64).to(dtype)
    return torch.cat([values, -values, 5 * torch.randn(200, dtype=dtype)])[:, None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.01, 1e-3])
def test_newton_converges_to_the_rounding_of_z(alpha, dtype, backend):
    z = extremes(dtype)
    x, _, iterations = ops.smooth_leaky_relu_inverse(z, alpha)
    values = x.double().numpy()
    slope = np.exp(leaky(values, alpha)[1])
    residual = np.abs(leaky(values, alpha)[0] - z.double().numpy())
    # What one rounding of x, and of the terms of f near it, makes of f.
    rounding = slope * (1 + np.abs(values)) + np.abs(z.double().numpy())
    assert (residual <= 8 * torch.finfo(dtype).eps * rounding).all()
    assert iterations.dtype == torch.int64
    assert iterations.shape == ()
    assert 1 <= iterations.item() <= 40


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.01])
def test_the_inverse_inverts(alpha, dtype, backend):
    z = torch.randn(1000, 3, dtype=dtype)
    x, log_abs_det, iterations = ops.smooth_leaky_relu_inverse(z, alpha)
    back, forward = ops.smooth_leaky_relu(x, alpha)
    limit = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    assert ((back - z).abs() <= limit * (1 + z.abs())).all()
    torch.testing.assert_close(log_abs_det, -forward, rtol=1e-5, atol=1e-5)
    again = ops.smooth_leaky_relu_inverse(ops.smooth_leaky_relu(z, alpha)[0], alpha)[0]
    # Going back divides the rounding of f by its slope.
    assert ((again - z).abs() <= limit * (1 + z.abs())).all()
    assert iterations.item() <= 15


@needs_native
def test_newton_does_not_depend_on_its_neighbours():
    z = extremes(torch.float32).view(1, -1)
    together = ops.smooth_leaky_relu_inverse(z, 0.01)[0]
    for i in range(0, z.shape[1], 7):
        others = torch.ones_like(z)
        others[0, i] = z[0, i]
        assert ops.smooth_leaky_relu_inverse(others, 0.01)[0][0, i] == together[0, i]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_finite_input_never_gives_nan(dtype, backend):
    x = extremes(dtype).requires_grad_()
    results = [ops.normal_log_prob(x)]
    for alpha in (1.0, 0.3, 1e-3):
        results += ops.smooth_leaky_relu(x, alpha)
        results += ops.smooth_leaky_relu_inverse(x, alpha)[:2]
    results += ops.logit(x, 0.05, inverse=True)
    params = torch.cat([extremes(dtype), extremes(dtype).flip(0)], 1).requires_grad_()
    for inverse in (False, True):
        results += ops.affine_coupling(x, params, inverse)
    assert not any(t.isnan().any() for t in results)
    grads = torch.autograd.grad(results, [x, params], [torch.ones_like(t) for t in results])
    assert not any(g.isnan().any() for g in grads)


def test_large_scales_of_actnorm(backend):
    x, shift = torch.tensor([[2.0, 2.0, 2.0]]), torch.zeros(3)
    log_scale = torch.tensor([87.0, 100.0, -100.0])
    y, log_abs_det = ops.actnorm(x, shift, log_scale, inverse=True)
    assert y[0, 1] == float("inf")
    assert 0 <= y[0, 2] < 1e-37
    torch.testing.assert_close(
        y[0, 0], torch.tensor(2 * np.exp(87.0), dtype=torch.float32), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(log_abs_det, torch.tensor([87.0]))


def test_logit_at_and_past_the_ends(backend):
    x = torch.tensor([[0.0], [1.0], [-0.5], [1.5]])
    y, _ = ops.logit(x, 0.0)
    assert y[:2, 0].tolist() == [float("-inf"), float("inf")]
    assert y[2:].isnan().all()


@needs_native
def test_cpu_only_build_explains_cuda_tensors():
    if snf_ext.build_info()["cuda"]:
        pytest.skip("built with CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for case in IMAGES:
        op = getattr(torch.ops.snf_ext, case.op).default
        with pytest.raises(NotImplementedError, match=r"built for the CPU only.*FORCE_CUDA=1"):
            op.redispatch(keys, *case.tensors(torch.float32), *case.rest)


@needs_native
def test_cuda_build_without_a_device_explains_itself():
    if not snf_ext.build_info()["cuda"] or torch.cuda.is_available():
        pytest.skip("for a build with CUDA on a machine without a GPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for case in IMAGES:
        tensors = case.tensors(torch.float32)
        op = getattr(torch.ops.snf_ext, case.op).default
        with pytest.raises(NotImplementedError, match="no CUDA device can be used here"):
            op.redispatch(keys, *tensors, *case.rest)
        backward = getattr(torch.ops.snf_ext, f"{case.op}_backward").default
        end = ([True] * len(tensors),) if len(tensors) > 1 else ()
        grads = [torch.ones_like(t) for t in case.function(*tensors)]
        with pytest.raises(NotImplementedError, match="no CUDA device can be used here"):
            backward.redispatch(keys, *grads, *tensors, *case.rest, *end)
