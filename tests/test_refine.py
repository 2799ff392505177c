"""Refined inverses against dense float64 solutions, and what happens where they diverge."""

from __future__ import annotations

import math
import warnings

import ground_truth
import numpy as np
import pytest
import torch

from snf_ext import Flow, InverseNotConverged, SelfNormConv2d, SelfNormLinear
from snf_ext.refine import _full_products, refined

SIZE = (4, 5)
CONVOLUTIONS = {
    "plain": {"channels": 2, "kernel_size": 3},
    "groups": {"channels": 4, "kernel_size": 3, "groups": 2},
    "dilation": {"channels": 2, "kernel_size": 3, "dilation": 2, "bias": False},
    "circular": {"channels": 2, "kernel_size": (3, 1), "padding_mode": "circular"},
    "larger inverse": {"channels": 2, "kernel_size": 3, "inverse_kernel_size": 5},
    "smaller inverse": {
        "channels": 2,
        "kernel_size": (5, 3),
        "inverse_kernel_size": (1, 3),
        "padding_mode": "circular",
    },
}
LAYERS = {
    "linear": lambda: SelfNormLinear(7),
    "linear no bias": lambda: SelfNormLinear(7, bias=False),
    **{name: (lambda o=options: SelfNormConv2d(**o)) for name, options in CONVOLUTIONS.items()},
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def off_course(make, dtype=torch.float64):
    """A layer whose learned inverse is wrong by some percent."""
    torch.manual_seed(3)
    layer = make().to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.04 * torch.randn_like(p)
    return layer.eval()


def events(layer, batch, dtype=torch.float64):
    torch.manual_seed(5)
    linear = isinstance(layer, SelfNormLinear)
    shape = (layer.features,) if linear else (layer.shape.channels, *SIZE)
    return torch.randn(batch, *shape, dtype=dtype)


def matrices(layer):
    """W and R as dense float64 matrices, and c for each element."""
    weights = [p.detach().double().numpy() for p in (layer.weight, layer.weight_inv)]
    width = len(weights[0])
    bias = np.zeros(width) if layer.bias is None else layer.bias.detach().double().numpy()
    if isinstance(layer, SelfNormLinear):
        return *weights, bias
    bias = np.repeat(bias, SIZE[0] * SIZE[1])
    return *(ground_truth.conv_matrix(w, SIZE, *layer.shape.geometry) for w in weights), bias


def dense_residual(layer, z, x):
    """Of each sample, in float64."""
    forward, _, bias = matrices(layer)
    y = z.flatten(1).double().numpy() - bias
    return np.linalg.norm(y - x.detach().flatten(1).double().numpy() @ forward.T, axis=1) / (
        np.linalg.norm(y, axis=1)
    )


@every_dtype
@every_layer
def test_reaches_float_precision(make, dtype):
    layer = off_course(make, dtype)
    z = events(layer, 6, dtype)
    forward, backward, bias = matrices(layer)
    radius = np.abs(np.linalg.eigvals(np.eye(len(forward)) - backward @ forward)).max()
    assert 0.01 < radius < 0.9, "this tests refining"
    eps = torch.finfo(dtype).eps
    assert dense_residual(layer, z, layer.inverse(z)).min() > 1e4 * eps

    x, residual, steps = layer.refine_inverse(z, 200)
    assert steps < 200, "ends by itself"
    assert x.dtype == residual.dtype == dtype
    assert residual.shape == (6,)
    assert residual.max() < 4 * eps
    assert dense_residual(layer, z, x).max() < 4 * eps
    want = np.linalg.solve(forward, (z.flatten(1).double().numpy() - bias).T).T
    scale, condition = np.abs(want).max(), np.linalg.cond(forward)
    assert np.abs(x.detach().flatten(1).numpy() - want).max() < 4 * eps * scale * condition
    assert torch.equal(layer.inverse(z, refine=200), x)


@every_layer
def test_a_step_multiplies_the_residual_by_one_matrix(make):
    """Against the iteration in dense matrices; more steps than asked for are not taken."""
    layer = off_course(make)
    z = events(layer, 3)
    forward, backward, bias = matrices(layer)
    y = (z.flatten(1).numpy() - bias).T
    error = np.eye(len(forward)) - forward @ backward
    for steps in range(4):
        x, residual, taken = layer.refine_inverse(z, steps)
        left = np.linalg.matrix_power(error, steps + 1) @ y
        want = np.linalg.norm(left, axis=0) / np.linalg.norm(y, axis=0)
        np.testing.assert_allclose(residual.numpy(), want, rtol=1e-9)
        solution = np.linalg.solve(forward, y - left).T
        np.testing.assert_allclose(x.detach().flatten(1).numpy(), solution, atol=1e-12)
        assert taken == steps


@every_layer
def test_no_refining_is_the_plain_inverse_bit_for_bit(make):
    layer = off_course(make, torch.float32)
    z = events(layer, 3, torch.float32)
    assert torch.equal(layer.inverse(z, refine=0), layer.inverse(z))
    assert torch.equal(layer.inverse(z, None, True, 0), layer.inverse(z, exact=True))
    assert torch.equal(layer.refine_inverse(z, 0).x, layer.inverse(z))


def counted(W, R):
    """The two maps, and how often each was used."""
    calls = {"forward": 0, "backward": 0}

    def forward(x):
        calls["forward"] += 1
        return x @ W.T

    def backward(y):
        calls["backward"] += 1
        return y @ R.T

    return forward, backward, calls


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_passes_are_as_asked(steps):
    forward, backward, calls = counted(torch.eye(4), 0.5 * torch.eye(4))
    result = refined(torch.randn(3, 4), forward, backward, steps)
    assert result.steps == steps
    assert calls == {"forward": steps + 1, "backward": steps + 1}
    torch.testing.assert_close(result.residual, torch.full((3,), 0.5 ** (steps + 1)))


def test_ends_when_the_residual_is_zero():
    forward, backward, calls = counted(2 * torch.eye(4), 0.5 * torch.eye(4))
    result = refined(torch.randn(3, 4), forward, backward, 50)
    assert (result.steps, calls["forward"]) == (0, 1)
    assert not result.residual.any()


def test_residual_that_grows_before_it_vanishes():
    """I - R W is nilpotent and large: no step but the last makes it smaller."""
    W = torch.eye(6, dtype=torch.float64) + 3 * torch.ones(6, 6).double().triu(1)
    forward, backward, _ = counted(W, torch.eye(6, dtype=torch.float64))
    y = torch.randn(5, 6, dtype=torch.float64)
    residuals = [refined(y, forward, backward, n).residual for n in (0, 3)]
    assert torch.equal(*residuals), "the best so far is the first"
    result = refined(y, forward, backward, 50)
    assert result.steps < 10
    assert result.residual.max() < 1e-12
    torch.testing.assert_close(result.x, torch.linalg.solve(W, y.T).T)


def diverging(dtype=torch.float32):
    """A layer with W = 1 and I - R W = diag(0.1, -2)."""
    layer = SelfNormLinear(2).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.weight_inv.copy_(torch.diag(torch.tensor([0.9, 3.0])))
    return layer


@pytest.mark.parametrize("steps", [1, 3, 60, 4000])
@every_dtype
def test_divergence_is_said_and_the_best_iterate_given(steps, dtype):
    """The second sample alone has a part that grows."""
    layer = diverging(dtype)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 0.0]], dtype=dtype)
    with pytest.warns(InverseNotConverged) as caught:
        x = layer.inverse(z, refine=steps)
    assert len(caught) == 1
    message = str(caught[0].message)
    first = math.hypot(0.1, 1.0) / math.hypot(1.0, 0.5)
    for part in (
        "refined inverse of SelfNormLinear(2, bias=True) does not converge for 1 of 3 samples",
        f"from at most {first:.3g} at the start",
        f"at most {first:.3g}. Use exact=True",
    ):
        assert part in message
    assert caught[0].filename == __file__
    torch.testing.assert_close(x[1], torch.tensor([0.9, 1.5], dtype=dtype))
    error = (0.1 ** (steps + 1)) if steps < 60 else 0.0
    torch.testing.assert_close(x[0], torch.tensor([1 - error, 0.0], dtype=dtype))
    assert not x[2].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = layer.refine_inverse(z, steps)
    assert torch.equal(result.x, x)
    torch.testing.assert_close(result.residual[1], torch.tensor(first, dtype=dtype))
    assert result.steps <= min(steps, 60)


def test_rounding_is_no_divergence():
    """Of 2,000 samples that start near float precision, some get worse by a rounding."""
    layer = SelfNormLinear(32)
    with torch.no_grad():
        layer.weight.add_(torch.randn(32, 32))
        layer.weight_inv.copy_(torch.linalg.inv(layer.weight.double()))
    z = torch.randn(2000, 32)
    assert dense_residual(layer, z, layer.inverse(z)).max() < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.inverse(z, refine=1)


def test_a_convolution_that_diverges():
    layer = off_course(LAYERS["groups"], torch.float32)
    with torch.no_grad():
        layer.weight_inv.mul_(3)
    z = events(layer, 4, torch.float32)
    with pytest.warns(InverseNotConverged, match=r"SelfNormConv2d\(4, .* for 4 of 4 samples"):
        x = layer.inverse(z, refine=300)
    assert torch.equal(x, layer.inverse(z))


def test_a_sample_does_not_depend_on_the_others():
    """Samples of one element each, whose residuals shrink at their own rates, grow, or are done."""
    rate = torch.tensor([0.7, 0.2, 0.01, 0.0, -1.5, 0.97])
    y = torch.diag(torch.tensor([1.0, 30.0, 1e-3, 2.0, 1.0, 1.0]))
    y = torch.cat((y, torch.zeros(1, 6), torch.full((1, 6), torch.nan), torch.ones(1, 6)))
    for n in (1, 5, 500):
        x, residual, steps = refined(y, lambda x: x, lambda r: (1 - rate) * r, n)
        alone = [refined(row, lambda x: x, lambda r: (1 - rate) * r, n) for row in y.split(1)]
        assert steps == max(one.steps for one in alone)
        for one, own_x, own_residual in zip(alone, x, residual, strict=True):
            torch.testing.assert_close(one.x[0], own_x, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                one.residual[0], own_residual, rtol=0, atol=0, equal_nan=True
            )
    assert len({one.steps for one in alone}) > 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_layer
def test_input_that_is_not_finite_ends_and_stays_alone(make, bad):
    layer = off_course(make)
    z = events(layer, 3)
    z[1].view(-1)[2] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, residual, steps = layer.refine_inverse(z, 1000)
        torch.testing.assert_close(layer.inverse(z, refine=1000), x, equal_nan=True)
        assert layer.refine_inverse(z[1:2], 1000).steps == 0
    assert steps < 100
    assert residual.isnan().tolist() == [False, True, False]
    assert residual[::2].max() < 1e-15
    assert not x[1].isfinite().all()


@every_layer
def test_zeros_and_an_empty_batch(make):
    layer = off_course(make)
    z = torch.zeros_like(events(layer, 2))
    if layer.bias is not None:
        z += (
            layer.bias.detach()
            if isinstance(layer, SelfNormLinear)
            else (layer.bias.detach()[:, None, None])
        )
    x, residual, steps = layer.refine_inverse(z, 9)
    assert not x.any()
    assert not residual.any()
    assert steps == 0
    x, residual, steps = layer.refine_inverse(z[:0], 9)
    assert (x.shape, residual.shape, steps) == (z[:0].shape, (0,), 0)
    assert layer.inverse(z[:0], refine=9).shape == z[:0].shape


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_underflow(scale):
    layer = off_course(LAYERS["linear no bias"], torch.float32)
    z = events(layer, 4, torch.float32)
    x, residual, _ = layer.refine_inverse(scale * z, 100)
    assert residual.max() < 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(x / scale, layer.inverse(z, exact=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (2, 3), (0, 2), (4, 1, 2)])
def test_leading_dimensions_of_the_linear_layer(lead):
    layer = off_course(LAYERS["linear"])
    z = torch.randn(*lead, 7, dtype=torch.float64)
    x, residual, _ = layer.refine_inverse(z, 100)
    assert x.shape == z.shape
    assert residual.shape == lead
    torch.testing.assert_close(x, layer.inverse(z, exact=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.inverse(z, refine=100), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_layer
def test_half_precision_is_computed_in_float32(make, dtype):
    layer = off_course(make, dtype)
    z = events(layer, 3, dtype)
    x, residual, _ = layer.refine_inverse(z, 100)
    assert x.dtype == residual.dtype == torch.float32
    assert residual.max() < 4 * torch.finfo(torch.float32).eps
    assert dense_residual(layer, z, x).max() < 4 * torch.finfo(torch.float32).eps
    back = layer.inverse(z, refine=100)
    assert back.dtype == dtype
    assert torch.equal(back, x.to(dtype))


@every_layer
def test_autocast_does_not_round(make):
    layer = off_course(make, torch.float32)
    z = events(layer, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer.refine_inverse(z, 100)
    assert torch.equal(result.x, layer.refine_inverse(z, 100).x)


def test_products_are_full_float32_and_the_settings_come_back():
    """On a GPU torch rounds convolutions to TF32 by default."""
    backends = torch.backends
    kinds = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ]
    at_first = [kind.fp32_precision for kind in kinds]
    seen = []

    def forward(x):
        seen.append([kind.fp32_precision for kind in kinds])
        return x

    try:
        backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision = "tf32", "bf16"
        before = [kind.fp32_precision for kind in kinds]
        refined(torch.ones(1, 2), forward, lambda y: 0.5 * y, 2)
        assert len(seen) == 3
        assert {kind for used in seen for kind in used} <= {"ieee", "none"}
        with pytest.raises(KeyError), _full_products():
            raise KeyError
        assert [kind.fp32_precision for kind in kinds] == before
    finally:
        for kind, precision in zip(kinds, at_first, strict=True):
            kind.fp32_precision = precision


@every_layer
def test_gradient_is_that_of_the_solution(make):
    """dL/dz = W^-T dL/dx, and the weight's through it; the bias's is the negative sum."""
    layer = off_course(make)
    z = events(layer, 3).requires_grad_()
    upstream = torch.randn(z.shape, dtype=torch.float64)
    layer.inverse(z, refine=100).backward(upstream)
    forward = matrices(layer)[0]
    want = np.linalg.solve(forward.T, upstream.flatten(1).numpy().T).T
    np.testing.assert_allclose(z.grad.flatten(1).numpy(), want, rtol=1e-9, atol=1e-11)
    x = layer.inverse(z.detach(), exact=True)
    dense = -want.T @ x.detach().flatten(1).numpy()
    if not isinstance(layer, SelfNormLinear):
        shape, geometry = tuple(layer.weight.shape), layer.shape.geometry
        dense = ground_truth.onto_kernel(dense, shape, SIZE, *geometry)
    np.testing.assert_allclose(layer.weight.grad.numpy(), dense, rtol=1e-8, atol=1e-10)
    assert layer.weight_inv.grad.abs().max() < 1e-10, "the solution does not depend on R"


@pytest.mark.parametrize("refine", [-1, 1.0, True, None, "2"])
@pytest.mark.parametrize("name", ["linear", "plain"])
def test_bad_numbers_of_steps(name, refine):
    layer = off_course(LAYERS[name])
    z = events(layer, 2)
    flow = Flow([layer], tuple(z.shape[1:]))
    for call, argument in [
        (lambda: layer.inverse(z, refine=refine), "refine"),
        (lambda: layer.inverse(z, exact=True, refine=refine), "refine"),
        (lambda: layer.refine_inverse(z, refine), "steps"),
        (lambda: flow.inverse(z, refine=refine), "refine"),
        (lambda: flow.sample(2, refine=refine), "refine"),
        (lambda: Flow([], (2,)).sample(2, refine=refine), "refine"),
    ]:
        with pytest.raises(
            ValueError, match=f"^{argument} must be an int of at least 0; got {refine!r}$"
        ):
            call()


@every_layer
def test_refined_and_exact_exclude_each_other(make):
    layer = off_course(make)
    z = events(layer, 2)
    flow = Flow([layer], tuple(z.shape[1:]))
    for call in (layer.inverse, flow.inverse, lambda _, **options: flow.sample(2, **options)):
        with pytest.raises(ValueError, match=r"refine must be 0 with exact=True, .*; got 2"):
            call(z, exact=True, refine=2)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"z must have shape \[..., D\] with D = 7; got \[2, 3\]"):
        off_course(LAYERS["linear"]).refine_inverse(torch.zeros(2, 3).double(), 2)
    with pytest.raises(ValueError, match=r"z must have shape \[B, C, H, W\] with C = 2"):
        off_course(LAYERS["plain"]).inverse(torch.zeros(2, 3).double(), refine=2)


@every_layer
def test_the_plain_inverse_compiles(make):
    torch.compiler.reset()
    layer = off_course(make)
    z = events(layer, 3)
    compiled = torch.compile(layer.inverse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), layer.inverse(z))
