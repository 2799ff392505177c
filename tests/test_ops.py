"""Every operator of the table against dense matrices, and the rules of a torch operator."""

from __future__ import annotations

import functools

import ground_truth
import numpy as np
import pytest
import torch
from conftest import needs_native
from ops_table import OPS

import snf_ext

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
# Of two ways to the same number by the same operator.
SAME = {torch.float64: 1e-12, torch.float32: 1e-5}
FIELDS = ground_truth.Truth._fields
SOME = [
    case
    for case in OPS
    if case.name
    in (
        *("linear", "conv-3x3", "conv-channels-16"),
        *("linear-plain", "conv-plain", "conv-share-0"),
    )
]
# Those of them that are told what to reconstruct, or who pays for it.
RULES = [case for case in SOME if case.rest.keys() & {"reconstruct", "penalty_share"}]


def ids(case):
    return case.name


def run(function, tensors, grads):
    """Outputs and gradients as a Truth of numpy arrays."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    z, log_det, recon = function(*leaves)
    assert torch.equal(log_det, torch.zeros_like(log_det))
    used = [t for t in leaves if t is not None]
    out = gradients((z, log_det, recon), used, grads)
    out = [*out, torch.zeros(())] if tensors[3] is None else out
    return ground_truth.Truth(*(t.detach().cpu().numpy() for t in (z, recon, *out)))


def gradients(outputs, leaves, grads):
    """Zeros where there is none; recon has none if nothing is reconstructed."""
    pairs = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


def function_of(case, backend):
    return case.native if backend == "native" else case.reference


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", OPS, ids=ids)
def test_equals_dense_matrices(case, dtype, backend, device):
    tensors, grads = case.tensors(dtype, device), case.gradients_of_outputs(dtype, device)
    ours = run(function_of(case, backend), tensors, grads)
    truth = case.truth(*(None if t is None else t.cpu() for t in (*tensors, *grads)), **case.rest)
    for name, got, want in zip(FIELDS, ours, truth, strict=True):
        if name == "dbias" and not case.bias:
            continue
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error}"


@pytest.mark.parametrize("case", [c for c in OPS if c.name.endswith("beyond")], ids=ids)
def test_no_dilation_is_too_large(case, backend, device):
    """For these images of 3 x 4, the largest comes to 7."""
    tensors, grads = case.tensors(device=device), case.gradients_of_outputs(device=device)
    ours, small = (
        run(
            functools.partial(snf_ext.ops.snf_conv2d, **case.rest | {"dilation": d}),
            tensors,
            grads,
        )
        for d in (2**31 - 1, (2**31 - 1) % 12)
    )
    for name, got, want in zip(FIELDS, ours, small, strict=True):
        assert np.array_equal(got, want), name


@needs_native
@pytest.mark.parametrize("case", OPS, ids=ids)
def test_same_bits_twice(case, device):
    tensors, grads = case.tensors(torch.float32, device), case.gradients_of_outputs(torch.float32)
    grads = [g.to(device) for g in grads]
    first, second = (run(case.native, tensors, grads) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


# Layers of more channels a group run torch's own convolutions, which may depend on them.
FUSED = [c for c in OPS if c.op == "snf_conv2d" and c.weight[1] <= 64]


@needs_native
@pytest.mark.parametrize("case", FUSED, ids=ids)
def test_convolution_does_not_depend_on_threads(case):
    tensors, grads = case.tensors(torch.float32), case.gradients_of_outputs(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case.native, tensors, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("case", OPS, ids=ids)
def test_gradcheck_without_the_learned_inverse_term(case, backend):
    """z and recon are true functions: their gradients must be the numerical ones.

    Two rules are set aside by what is held fixed: the halves (SNF 10, 11) concern only the weights
    through z, and recon sends no gradient to x.
    """
    function = function_of(case, backend)
    x, weight, weight_inv, bias = case.tensors()
    x = x[:2]

    def recon_of_weights(w, r):
        return function(x, w, r, bias)[2]

    def z_of_data(x_, bias_):
        return function(x_, weight, weight_inv, bias_)[0]

    if x.numel() * max(weight.numel(), weight_inv.numel()) > 20_000:
        pytest.skip("too many numerical derivatives")
    # Less than all of the penalty's gradient is not the numerical one.
    weights = [weight.requires_grad_(case.penalty_share == 1), weight_inv.requires_grad_()]
    if case.reconstruct:
        assert torch.autograd.gradcheck(recon_of_weights, weights, fast_mode=True)
    data = [x.requires_grad_(), None if bias is None else bias.requires_grad_()]
    assert torch.autograd.gradcheck(z_of_data, data, fast_mode=True)


@pytest.mark.parametrize("case", OPS, ids=ids)
def test_recon_sends_no_gradient_to_x(case, backend):
    x, *rest = case.tensors()
    x.requires_grad_()
    recon = function_of(case, backend)(x, *rest)[2]
    assert recon.requires_grad == case.reconstruct
    if case.reconstruct:
        (grad,) = torch.autograd.grad(recon.sum(), x, allow_unused=True)
        assert grad is None or not grad.any()


@pytest.mark.parametrize("case", SOME, ids=ids)
def test_gradients_follow_the_scale_of_the_loss(case, backend):
    """The public code adds the inverse term whatever the loss's scale; these must not."""
    tensors, grads = case.tensors(), case.gradients_of_outputs()
    function = function_of(case, backend)
    full = run(function, tensors, grads)
    tenth = run(function, tensors, [0.1 * g for g in grads])
    for name in ("dx", "dweight", "dweight_inv", "dbias"):
        np.testing.assert_allclose(getattr(tenth, name), 0.1 * getattr(full, name), atol=1e-12)


@pytest.mark.parametrize("case", SOME, ids=ids)
def test_two_micro_batches_add_up(case, backend):
    tensors, grads = case.tensors(), case.gradients_of_outputs()
    function = function_of(case, backend)
    full = run(function, tensors, grads)
    cut = case.x[0] // 2
    parts = [
        run(function, (tensors[0][part], *tensors[1:]), [g[part] for g in grads])
        for part in (slice(None, cut), slice(cut, None))
    ]
    for name in ("dweight", "dweight_inv", "dbias"):
        summed = getattr(parts[0], name) + getattr(parts[1], name)
        np.testing.assert_allclose(summed, getattr(full, name), atol=1e-12)


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "weight_inv", "bias"])
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_only_what_is_needed(case, wanted, dtype, backend, device):
    """Each gradient alone equals the same gradient among all four."""
    tensors, grads = case.tensors(dtype, device), case.gradients_of_outputs(dtype, device)
    function = function_of(case, backend)
    together = run(function, tensors, grads)[2 + wanted]
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    (alone,) = gradients(function(*leaves), leaves[wanted], grads)
    np.testing.assert_allclose(alone.cpu(), together, rtol=SAME[dtype], atol=SAME[dtype])


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("output", range(3), ids=["z", "log_det", "recon"])
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_each_output_alone(case, output, dtype, backend, device):
    """Gradients through one output equal those with zeros for the others."""
    tensors, grads = case.tensors(dtype, device), case.gradients_of_outputs(dtype, device)
    function = function_of(case, backend)
    masked = [g if i == output else torch.zeros_like(g) for i, g in enumerate(grads)]
    want = run(function, tensors, masked)
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)[output]
    if output == 2 and not case.reconstruct:
        assert not value.requires_grad
        return
    got = torch.autograd.grad(value, leaves, grads[output], materialize_grads=True)
    for a, b in zip(got, want[2:], strict=True):
        np.testing.assert_allclose(a.cpu(), b, rtol=SAME[dtype], atol=SAME[dtype])


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_empty_batch(case, dtype, backend, device):
    x, *rest = case.tensors(dtype, device)
    leaves = [t.requires_grad_() for t in (x[:0], *rest)]
    z, log_det, recon = function_of(case, backend)(*leaves)
    assert z.shape == leaves[0].shape
    assert log_det.shape == recon.shape == (0,)
    loss = z.sum() + log_det.sum() + recon.sum()
    grads = torch.autograd.grad(loss, leaves[1:], materialize_grads=True)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_non_contiguous(case, dtype, backend, device):
    tensors, grads = case.tensors(dtype, device), case.gradients_of_outputs(dtype, device)
    function = function_of(case, backend)
    plain = run(function, tensors, grads)

    def strided(t):
        if t is None or t.dim() < 1:
            return t
        wide = torch.stack([t, t + 1], -1)
        return wide[..., 0]

    other = run(function, [strided(t) for t in tensors], [strided(g) for g in grads])
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=SAME[dtype], atol=SAME[dtype])


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("case", [c for c in SOME if c.op == "snf_conv2d"], ids=ids)
def test_channels_last(case, dtype, backend, device):
    tensors, grads = case.tensors(dtype, device), case.gradients_of_outputs(dtype, device)
    function = function_of(case, backend)
    plain = run(function, tensors, grads)
    x = tensors[0].to(memory_format=torch.channels_last)
    other = run(function, (x, *tensors[1:]), grads)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=SAME[dtype], atol=SAME[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_half_precision_accumulates_in_float32(case, dtype, backend, device):
    """Inputs and outputs are rounded once each; everything between is float32."""
    tensors = case.tensors(dtype, device)
    grads = case.gradients_of_outputs(dtype, device)
    function = function_of(case, backend)
    leaves = [t.requires_grad_() for t in tensors]
    z, log_det, recon = function(*leaves)
    assert z.dtype == dtype
    assert log_det.dtype == recon.dtype == torch.float32
    got = gradients((z, log_det, recon), leaves, [grads[0], *(g.float() for g in grads[1:])])
    truth = case.truth(*(t.detach().double().cpu() for t in (*tensors, *grads)), **case.rest)
    rounding = torch.finfo(dtype).eps
    for name, a in zip(FIELDS, (z, recon, *got), strict=True):
        want = getattr(truth, name)
        error = np.abs(a.detach().double().cpu().numpy() - want).max()
        error /= max(np.abs(want).max(), 1e-30)
        # y is read back from the rounded z, which costs dR one rounding more.
        limit = 1e-5 if name == "recon" else 2 * rounding
        assert error < limit, f"{name}: {error}"


@pytest.mark.parametrize("case", SOME, ids=ids)
def test_autocast_computes_in_float32(case, backend, device):
    tensors = case.tensors(torch.float32, device)
    grads = case.gradients_of_outputs(torch.float32, device)
    function = function_of(case, backend)
    plain = run(function, tensors, grads)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = run(function, tensors, grads)
    for a, b in zip(plain, under, strict=True):
        assert np.array_equal(a, b)
    half = tuple(t.bfloat16() for t in tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        z, _, recon = function(*half)
    assert z.dtype == recon.dtype == torch.float32


@pytest.mark.parametrize("case", SOME, ids=ids)
def test_double_backward_is_refused(case, backend):
    leaves = [t.requires_grad_() for t in case.tensors()]
    z, _, recon = function_of(case, backend)(*leaves)
    (grad,) = torch.autograd.grad((z.square().sum() + recon.sum()), leaves[1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward .* is not supported"):
        grad.sum().backward()


@needs_native
@pytest.mark.parametrize("case", OPS, ids=ids)
def test_opcheck(case, device_or_meta):
    tensors = case.tensors(torch.float32, device_or_meta)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    op = getattr(torch.ops.snf_ext, case.op).default
    torch.library.opcheck(op, tuple(leaves), case.rest)


@needs_native
@pytest.mark.parametrize(
    "mask", [[True] * 4, [False, True, False, False], [True, False, True, False]]
)
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_opcheck_of_the_inner_operators(case, mask, device_or_meta):
    ops = torch.ops.snf_ext
    x, weight, weight_inv, bias = case.tensors(torch.float32, device_or_meta)
    grads = case.gradients_of_outputs(torch.float32, device_or_meta)
    rest = case.geometry
    forward = getattr(ops, f"{case.op}_forward").default
    backward = getattr(ops, f"{case.op}_backward").default
    arguments = (x, weight, weight_inv, bias, *rest, case.reconstruct)
    torch.library.opcheck(forward, arguments)
    z, _, _, residual = forward(*arguments)
    kept = (z, residual) if case.reconstruct else (None, None)
    assert case.reconstruct or residual.numel() == 0
    arguments = (*grads, x, *kept, weight, weight_inv, bias, *rest, case.penalty_share, mask)
    torch.library.opcheck(backward, arguments)
    wanted = [m and (i != 2 or case.reconstruct) for i, m in enumerate(mask)]
    assert [t.numel() > 0 for t in backward(*arguments)] == wanted


@pytest.mark.parametrize("case", [c for c in RULES if not c.reconstruct], ids=ids)
def test_without_a_reconstruction_only_inputs_are_kept(case, backend):
    """Neither z nor a residual, and weight_inv gets no gradient, not even zeros."""
    leaves = [t.requires_grad_() for t in case.tensors()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z, log_det, _ = function_of(case, backend)(*leaves)
    inputs = {t.data_ptr() for t in leaves}
    assert {t.data_ptr() for t in kept} <= inputs
    # z is not kept: changing it is no error.
    z.detach().zero_()
    (z.sum() + log_det.sum()).backward()
    assert [t.grad is None for t in leaves] == [False, False, True, False]


@needs_native
@pytest.mark.parametrize("case", RULES, ids=ids)
def test_compiles_as_one_graph(case, device):
    tensors = case.tensors(torch.float32, device)
    grads = case.gradients_of_outputs(torch.float32, device)

    def loss(*leaves):
        return sum((t * g).sum() for t, g in zip(function(*leaves), grads, strict=True))

    function = functools.partial(getattr(snf_ext.ops, case.op), **case.rest)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in tensors]
    eager, traced = (
        torch.autograd.grad(f(*leaves), leaves, materialize_grads=True) for f in (loss, compiled)
    )
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize("case", SOME, ids=ids)
def test_meta(case):
    tensors = case.tensors(torch.float32, "meta")
    z, log_det, recon = case.native(*tensors)
    want = case.native(*case.tensors(torch.float32))
    for a, b in zip((z, log_det, recon), want, strict=True):
        assert a.is_meta
        assert a.shape == b.shape
        assert a.dtype == b.dtype


@needs_native
@pytest.mark.parametrize(
    ("op", "x", "weight"),
    [("snf_linear", (3, 700), (700, 700)), ("snf_conv2d", (5, 3, 150, 140), (3, 3, 3, 3))],
)
def test_large_tensors_come_from_a_pool_and_keep_their_values(op, x, weight):
    """Memory freed by one step serves the next, and never a tensor that is still held."""

    def step(seed, function):
        generator = torch.Generator().manual_seed(seed)
        leaves = [
            torch.randn(shape, generator=generator).mul_(scale).requires_grad_()
            for shape, scale in ((x, 1.0), (weight, 0.1), (weight, 0.1))
        ]
        z, log_det, recon = function(*leaves)
        loss = z.square().mean() - log_det.mean() + recon.mean()
        return [z.detach(), *torch.autograd.grad(loss, leaves)]

    native, reference = getattr(torch.ops.snf_ext, op), getattr(snf_ext.reference, op)
    held = step(0, native)
    copies = [t.clone() for t in held]
    for seed in (1, 2, 3):
        for ours, want in zip(step(seed, native), step(seed, reference), strict=True):
            torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-4 * want.abs().max().item())
    for t, copy in zip(held, copies, strict=True):
        assert torch.equal(t, copy)


def test_exact_inverse_gives_the_exact_gradient(backend):
    """With weight_inv the exact inverse, the linear layer's gradient is that of slogdet, halved."""
    weight = torch.randn(5, 5, dtype=torch.float64).requires_grad_()
    inverse = torch.linalg.inv(weight.detach()).requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64)
    log_det = snf_ext.ops.snf_linear(x, weight, inverse)[1]
    ours = torch.autograd.grad(log_det.sum(), (weight, inverse))
    exact_w = torch.autograd.grad(3 * torch.linalg.slogdet(weight).logabsdet, weight)[0]
    exact_r = torch.autograd.grad(-3 * torch.linalg.slogdet(inverse).logabsdet, inverse)[0]
    torch.testing.assert_close(ours[0], exact_w / 2)
    torch.testing.assert_close(ours[1], exact_r / 2)
