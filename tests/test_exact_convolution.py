"""Exact values of convolutions without a dense matrix, against dense matrices."""

from __future__ import annotations

import subprocess
import sys

import ground_truth
import numpy as np
import pytest
import torch

from snf_ext import ExactConv2d, SelfNormConv2d, exact
from snf_ext.exact import block_lu, convolution, log_abs_det, plan
from snf_ext.exact.band_lu import BandLUs
from snf_ext.exact.block_lu import BlockLU


def most_blocks(kernels, size):
    return max(plan.layouts(kernels, size), key=lambda layout: layout.blocks)


def most_blocks_of_columns(kernels, size):
    columns = [layout for layout in plan.layouts(kernels, size) if layout.transposed]
    return max(columns, key=lambda layout: layout.blocks)


def one_block(kernels, size):
    return min(plan.layouts(kernels, size), key=lambda layout: layout.blocks)


WAYS = {
    "chosen": plan.layout_of,
    "rows": most_blocks,
    "columns": most_blocks_of_columns,
    "dense": one_block,
    "band": most_blocks,
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way of factorising takes its turn, whatever the plan thinks is cheap."""
    for module in (convolution, log_abs_det):
        monkeypatch.setattr(module, "layout_of", WAYS[request.param])
    if request.param == "band":
        monkeypatch.setattr(block_lu, "_MAX_GROWTH", dict.fromkeys(block_lu._MAX_GROWTH, -1.0))
    return request.param


def drawn(seed, largest=400):
    """Kernel, image size, dilation, groups, circular; small images, kernels larger than them."""
    rng = np.random.default_rng(seed)
    groups, per_group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    kernel = tuple(int(k) for k in rng.choice([1, 3, 5, 7], 2))
    dilation, circular = int(rng.integers(1, 4)), bool(rng.integers(4) == 0)
    size = [int(rng.choice([1, 2, 3, 4, 6, 9, 15])) for _ in range(2)]
    while groups * per_group * size[0] * size[1] > largest:
        size[int(np.argmax(size))] //= 2
    spread = float(rng.choice([0.1, 0.5, 2.0])) / np.sqrt(per_group * kernel[0] * kernel[1])
    weight = spread * rng.standard_normal((groups * per_group, per_group, *kernel))
    if rng.integers(4):  # near the identity, as layers start
        for o in range(groups * per_group):
            weight[o, o % per_group, kernel[0] // 2, kernel[1] // 2] += rng.choice([-1, 1])
    return torch.from_numpy(weight), (tuple(size), dilation, groups, circular)


def truth(weight, geometry):
    matrix = ground_truth.conv_matrix(weight, *geometry)
    inverse = np.linalg.inv(matrix)
    gradient = ground_truth.onto_kernel(inverse.T, tuple(weight.shape), *geometry)
    return matrix, np.linalg.slogdet(matrix)[1], gradient


def check(weight, geometry, device="cpu", condition=None):
    matrix, value, gradient = truth(weight, geometry)
    condition = condition or np.linalg.cond(matrix)
    lu = exact.factorize_conv2d(weight.to(device), *geometry)
    leaf = weight.to(device).requires_grad_()
    trained = exact.conv2d_log_abs_det(leaf, *geometry)
    trained.backward()
    # Dense matrices err by as much: rounding times the condition, relative to the dimension.
    bound = len(matrix) * max(1e-12, 4e-16 * condition)
    assert abs(lu.log_abs_det.item() - value) < bound
    assert abs(trained.item() - value) < bound
    error = np.abs(leaf.grad.cpu().numpy() - gradient).max() / np.abs(gradient).max()
    assert error < max(1e-12, 1e-15 * condition)
    rhs = np.random.default_rng(1).standard_normal((3, len(matrix)))
    given = torch.from_numpy(rhs.copy()).to(device)
    x = lu.solve(given).cpu().numpy()
    assert torch.equal(given.cpu(), torch.from_numpy(rhs))
    scale = np.linalg.norm(matrix) * np.linalg.norm(x) + np.linalg.norm(rhs)
    assert np.linalg.norm(x @ matrix.T - rhs) < 1e-12 * scale


@pytest.mark.parametrize("seed", range(40))
def test_against_dense(seed, device):
    check(*drawn(seed), device)


@pytest.mark.parametrize("seed", range(100, 112))
def test_every_way(seed, way):
    check(*drawn(seed, largest=200))


@pytest.mark.parametrize("seed", range(200, 220))
def test_near_singular(seed):
    """An eigenvalue is moved to 1e-8 of where it was: condition numbers of about 1e8 and more."""
    weight, geometry = drawn(seed, largest=150)
    eigenvalues = np.linalg.eigvals(ground_truth.conv_matrix(weight, *geometry))
    real = eigenvalues[np.abs(eigenvalues.imag) < 1e-12].real
    if not len(real):
        pytest.skip("all eigenvalues are complex")
    smallest = real[np.argmin(np.abs(real))] * (1 - 1e-8)
    for o in range(len(weight)):
        weight[o, o % weight.shape[1], weight.shape[2] // 2, weight.shape[3] // 2] -= smallest
    condition = np.linalg.cond(ground_truth.conv_matrix(weight, *geometry))
    assert condition > 1e7
    check(weight, geometry, condition=condition)


@pytest.mark.parametrize("seed", range(300, 320))
def test_float32(seed, device):
    weight, geometry = drawn(seed)
    weight = weight.float()
    matrix, value, _ = truth(weight, geometry)
    lu = exact.factorize_conv2d(weight.to(device), *geometry)
    assert lu.log_abs_det.dtype == torch.float64
    assert abs(lu.log_abs_det.item() - value) < 1e-6
    assert abs(exact.conv2d_log_abs_det(weight.to(device), *geometry).item() - value) < 1e-3
    rhs = torch.randn(2, len(matrix), device=device)
    assert lu.solve(rhs).dtype == torch.float32


@pytest.mark.parametrize("seed", range(330, 345))
def test_gradient_in_float32(seed, way):
    """As the gradient monitor asks for it: half the cost, and digits enough for an angle."""
    weight, geometry = drawn(seed, largest=200)
    matrix, value, gradient = truth(weight, geometry)
    weight.requires_grad_()
    got = exact.conv2d_log_abs_det(weight, *geometry, precision=torch.float32)
    got.backward()
    bound = max(1e-5, 1e-6 * np.linalg.cond(matrix))
    assert abs(got.item() - value) < bound * len(matrix)
    error = np.abs(weight.grad.numpy() - gradient).max() / np.abs(gradient).max()
    assert error < bound


def test_negative_determinant():
    weight = -2 * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert exact.factorize_conv2d(weight, (1, 3), 1, 1, False).log_abs_det.item() == pytest.approx(
        3 * np.log(2)
    )


def repeated_channel(weight):
    weight[1] = weight[0]


def no_centre(weight):
    weight.zero_()
    weight[:, :, 0] = 1  # strictly triangular


SINGULAR = {"zero": torch.Tensor.zero_, "repeated channel": repeated_channel, "shift": no_centre}


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular(name, circular, way):
    if circular and name == "shift":
        pytest.skip("a circular shift is invertible")
    layer = SelfNormConv2d(2, 3, padding_mode="circular" if circular else "zeros").double()
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
        SINGULAR[name](layer.weight)
    # Where LAPACK adds two equal rows up in different orders, rounding is left of 48 pivots.
    most = 48 * np.log(1e-13) if name == "repeated channel" else -np.inf
    value = layer.log_abs_det((8, 6)).item()
    assert value <= most
    if value == -np.inf:
        with pytest.raises(ValueError, match="weight is singular"):
            layer.inverse(torch.zeros(1, 2, 8, 6).double(), exact=True)
    assert exact.conv2d_log_abs_det(layer.weight, (8, 6), 1, 1, circular).item() <= most


def test_nan(way):
    weight = torch.full((1, 1, 3, 3), torch.nan)
    for circular in (False, True):
        lu = exact.factorize_conv2d(weight, (12, 9), 1, 1, circular)
        assert lu.log_abs_det.isnan()
        assert lu.solve(torch.ones(1, 108)).isnan().all()


def test_weak_pivots_are_left_to_the_band(monkeypatch):
    """No pivot on the diagonal: the matrix exchanges rows, which no elimination by blocks can."""
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[0, 0, :, 1] = torch.tensor([1.0, 1e-8, 1.0])
    kernels, size = weight[None], (18, 12)
    assert BlockLU(kernels, size, 1).weak.all()
    rows = next(p for p in plan.layouts(tuple(kernels.shape), size) if not p.transposed)
    assert isinstance(convolution.factorize_groups(kernels, rows), BandLUs)
    monkeypatch.setattr(convolution, "layout_of", lambda *_: rows)
    monkeypatch.setattr(log_abs_det, "layout_of", lambda *_: rows)
    check(weight, (size, 1, 1, False))


def test_growth_is_seen_before_digits_are_lost():
    """Kernels far from the identity: where blocks are kept, they are as good as the band."""
    kept = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        kernels = torch.randn(1, 2, 2, 3, 3, generator=generator, dtype=torch.float64) / 6
        kernels[0, :, :, 1, 1] += seed / 40 * torch.eye(2)
        lu = BlockLU(kernels, (12, 9), 1)
        matrix = ground_truth.conv_matrix(kernels[0], (12, 9))
        error = abs(lu.log_abs_det.item() - np.linalg.slogdet(matrix)[1])
        kept += not lu.weak.any()
        assert lu.weak.any() or error < 1e-10
    assert 20 < kept < 60


def test_fixed_point_takes_few_steps():
    """A 3 x 64 x 64 image near the identity: a few of 64 steps say all of them."""
    kernels = torch.zeros(1, 3, 3, 3, 3, dtype=torch.float64)
    kernels += 0.03 * torch.randn_like(kernels)
    kernels[0, :, :, 1, 1] += torch.eye(3)
    short, tall = (BlockLU(kernels, (h, 64), 1) for h in (32, 64))
    assert len(tall._steps) < 20
    assert len(short._steps) == len(tall._steps)
    # Far from the edges each row adds the same.
    third = BlockLU(kernels, (48, 64), 1)
    assert (tall.log_abs_det - third.log_abs_det).item() == pytest.approx(
        (third.log_abs_det - short.log_abs_det).item(), rel=1e-12
    )


def test_gradients_through_the_solution(way):
    weight, geometry = drawn(5, largest=60)
    lu = exact.factorize_conv2d(weight, *geometry)
    size = weight.shape[0] * geometry[0][0] * geometry[0][1]
    rhs = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lu.solve, (rhs,))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_what_inference_mode_keeps_serves_outside(padding_mode):
    layer = SelfNormConv2d(3, 3, dilation=2, padding_mode=padding_mode).eval()
    z = torch.randn(2, 3, 11, 7)
    with torch.inference_mode():
        layer(z)
        layer.inverse(z, exact=True)
    z.requires_grad_()
    layer.inverse(z, exact=True).sum().backward()
    assert z.grad.isfinite().all()


def test_operator(way):
    kernels = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64) / 9
    kernels[:, :, :, 1, 1] += torch.eye(2)
    kernels.requires_grad_()
    op = torch.ops.snf_ext.exact_log_abs_det
    torch.library.opcheck(op, (kernels, 7, 4))
    assert torch.autograd.gradcheck(lambda k: op(k, 7, 4)[0], (kernels,))
    value = op(kernels, 7, 4)[0]
    (gradient,) = torch.autograd.grad(value, kernels, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_compiles():
    layer = ExactConv2d(2, 3)
    x = torch.randn(3, 2, 12, 10)
    assert exact.plan_conv2d(tuple(layer.weight.shape), (12, 10)).method == "blocks"

    def loss(x):
        z, log_det, _ = layer(x)
        return z.square().sum() - log_det.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(x), layer.weight)
    got = torch.autograd.grad(compiled(x), layer.weight)
    torch.testing.assert_close(got, want)


def test_half_precision_weight():
    layer = ExactConv2d(2, 3).bfloat16()
    value = layer.log_abs_det((12, 10))
    value.backward()
    assert value.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()


# ---- Plan and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "options", "method"),
    [
        ((1, 1, 3, 3), (28, 28), {}, "blocks"),
        ((16, 16, 3, 3), (7, 7), {}, "blocks"),
        ((48, 48, 3, 3), (2, 2), {}, "dense"),
        ((8, 8, 1, 1), (64, 64), {}, "dense"),
        ((8, 8, 3, 3), (64, 64), {"circular": True}, "fourier"),
    ],
)
def test_plan(shape, size, options, method):
    made = exact.plan_conv2d(shape, size, **options)
    assert made.method == method
    dimension = shape[0] * size[0] * size[1]
    assert made.dense_bytes == 8 * dimension**2
    assert made.operations <= made.dense_operations
    assert method in str(made)
    assert f"{made.bytes / 1e6:.1f} MB" in str(made) or "KB" in str(made) or "bytes" in str(made)


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_memory_is_what_the_plan_says(rows):
    kernels = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64) / 5
    kernels[:, :, :, 1, 1] += torch.eye(3)
    lu = BlockLU(kernels, (12, 8), rows)
    held = [t for step in lu._steps for t in step] + [lu._last_lu]
    taken = sum(t.untyped_storage().nbytes() for t in held)
    layouts = plan.layouts(tuple(kernels.shape), (12, 8))
    planned = next((p for p in layouts if p.rows == rows and not p.transposed), None)
    if planned is None:  # 5 is no power of 2
        planned = plan._layout(False, (12, 8), rows, 24, 2)
    assert 0.25 * planned.bytes < taken <= planned.bytes


def test_no_memory(monkeypatch):
    """The error comes before anything is taken, and says what does fit."""
    from snf_ext.exact import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    layer = SelfNormConv2d(3, 3)
    need = r"3x3 convolution on 3x64x64 images .* needs 40\.1 MB, and 1\.0 MB are available"
    for ask in (
        lambda: layer.log_abs_det((64, 64)),
        lambda: layer.inverse(torch.zeros(1, 3, 64, 64), exact=True),
        lambda: ExactConv2d(3, 3)(torch.zeros(1, 3, 64, 64)),
    ):
        with pytest.raises(MemoryError, match=need + r".*refine=n.*circular"):
            ask()
    assert layer.log_abs_det((4, 4)).isfinite()
    assert SelfNormConv2d(3, 3, padding_mode="circular").log_abs_det((64, 64)).isfinite()


def test_available_memory_is_known_here():
    from snf_ext.exact.memory import available_bytes

    known = available_bytes()
    assert known is None or 1e6 < known < 1e15


MEASURE = """
import torch
from snf_ext import ExactConv2d
torch.set_num_threads(1)
torch.manual_seed(0)  # some give a layer whose condition is beyond float32

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

layer, x = ExactConv2d(3, 3), torch.randn(2, 3, 64, 64)
ExactConv2d(3, 3)(x[:, :, :9, :9]).log_det.sum().backward()  # what any use loads
with torch.no_grad():
    layer.weight += 0.1 * torch.randn_like(layer.weight)
before = peak()
layer(x).log_det.sum().backward()
assert (layer.inverse(layer(x).z) - x).abs().max() < 1e-3
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    """3 x 64 x 64 by 3 x 3: a dense matrix would be 1.2 GB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300


# ---- Whole flows -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("model", ["conv", "glow"])
def test_large_images(model, size, monkeypatch):
    """The 9-layer model and 3x3 mixing on colour images, and never a matrix of D x D."""
    import snf_ext

    largest = []
    made = torch.linalg.lu_factor_ex

    def watched(matrix, *args, **kwargs):
        largest.append(matrix.shape[-1])
        return made(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", watched)
    if model == "conv":
        flow = snf_ext.models.conv((3, size, size))
    else:
        flow = snf_ext.models.glow((3, size, size), levels=3, steps=1, width=8, kernel_size=3)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if name.endswith("weight"):
                p += 0.01 * torch.randn_like(p)
    flow.eval()
    x = torch.randint(256, (1, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        flow(x)  # actnorm
        torch.manual_seed(1)
        first = flow.log_prob(x)
        count = len(largest)
        torch.manual_seed(1)
        torch.testing.assert_close(flow.log_prob(x), first)
        assert first.isfinite()
        assert flow.sample(1, exact=True).isfinite().all()
    assert 0 < count == len(largest)  # factorised once
    assert max(largest) <= 12 * size  # a row of blocks, at most
