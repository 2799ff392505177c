"""The debiased gradient: its mean is the exact gradient, its value and its limits."""

from __future__ import annotations

import ground_truth
import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import Debias, SelfNormConv2d, SelfNormLinear, ops, reference
from snf_ext.layers import self_norm
from snf_ext.layers.debias import scales_of, signs

DRAWS, PROBES = 40, 100


def linear_layer(debias, error=0.4, features=64):
    """R an inverse whose E = I - W R has the spectral norm ``error``."""
    layer = SelfNormLinear(features, bias=False, debias=debias).double()
    with torch.no_grad():
        layer.weight += torch.randn(features, features, dtype=torch.float64) / (3 * features**0.5)
        e = torch.randn(features, features, dtype=torch.float64)
        e *= error / torch.linalg.matrix_norm(e, 2)
        layer.weight_inv.copy_(torch.linalg.solve(layer.weight, torch.eye(features) - e))
    return layer, torch.zeros(3, features, dtype=torch.float64)


def conv_layer(debias, channels, size, groups=1, **options):
    layer = SelfNormConv2d(channels, 3, groups=groups, debias=debias, bias=False, **options)
    layer = layer.double()
    with torch.no_grad():
        layer.weight += 0.15 * torch.randn_like(layer.weight) / (channels / groups) ** 0.5
        layer.weight_inv.copy_(2 * torch.nn.init.dirac_(torch.empty_like(layer.weight), groups))
        layer.weight_inv -= layer.weight  # 2 I - W: the first two terms of the series of W^-1
    return layer, torch.zeros(3, channels, *size, dtype=torch.float64)


LAYERS = {
    "linear": lambda debias: linear_layer(debias),
    "1x14x14": lambda debias: conv_layer(debias, 1, (14, 14)),
    "4x8x8": lambda debias: conv_layer(debias, 4, (8, 8)),
    "groups": lambda debias: conv_layer(debias, 4, (6, 5), groups=2),
    "circular": lambda debias: conv_layer(debias, 2, (5, 6), padding_mode="circular"),
    "dilation": lambda debias: conv_layer(debias, 2, (7, 6), dilation=2),
}


def exact_gradient(layer, x):
    """Half of S times the gradient of log |det|, from a dense inverse."""
    weight = layer.weight.detach().numpy()
    if isinstance(layer, SelfNormLinear):
        return torch.from_numpy(len(x) / 2 * np.linalg.inv(weight).T)
    shape = layer.shape
    geometry = (tuple(x.shape[2:]), shape.dilation, shape.groups, shape.circular)
    inverse = np.linalg.inv(ground_truth.conv_matrix(weight, *geometry))
    return torch.from_numpy(
        len(x) / 2 * ground_truth.onto_kernel(inverse.T, weight.shape, *geometry)
    )


def drawn_gradient(layer, x):
    layer.weight.grad = None
    layer(x).log_det.sum().backward()
    return layer.weight.grad.clone()


def dense(layer, x):
    """W and R as matrices, and how a matrix's gradient becomes the weight's."""
    if isinstance(layer, SelfNormLinear):
        return layer.weight.detach().numpy(), layer.weight_inv.detach().numpy(), lambda m: m
    shape = layer.shape
    geometry = (tuple(x.shape[2:]), shape.dilation, shape.groups, shape.circular)
    w, r = (
        ground_truth.conv_matrix(k.detach(), *geometry) for k in (layer.weight, layer.weight_inv)
    )
    return w, r, lambda m: ground_truth.onto_kernel(m, tuple(layer.weight.shape), *geometry)


@pytest.mark.parametrize("terms", [1, 2, 8, 60])
@pytest.mark.parametrize("name", LAYERS)
def test_mean_over_the_probes(name, terms, monkeypatch):
    """Probes of a whole basis, sqrt(D) long, have the mean v v' = I exactly: no noise is left."""
    layer, x = LAYERS[name](terms)
    basis = torch.eye(x[0].numel(), dtype=torch.float64) * x[0].numel() ** 0.5
    monkeypatch.setattr(self_norm, "signs", lambda *_: basis.reshape(-1, *x.shape[1:]))
    w, r, onto = dense(layer, x)
    e = np.eye(len(w)) - w @ r
    series = sum(np.linalg.matrix_power(e, k) for k in range(terms + 1))
    want = len(x) / 2 * onto((r @ series).T)
    got = drawn_gradient(layer, x).numpy()
    np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())
    true = exact_gradient(layer, x).numpy()
    error = np.linalg.norm(got - true) / np.linalg.norm(true)
    learned = np.linalg.norm(len(x) / 2 * onto(r.T) - true) / np.linalg.norm(true)
    assert error < learned * max(0.6**terms, 1e-9)


@pytest.mark.parametrize("roulette", [0.0, 0.7])
def test_mean_of_random_signs(roulette):
    """4,000 probes, a hundred at a time: their mean is the exact gradient, within its error."""
    layer, x = linear_layer(Debias(2 if roulette else 8, PROBES, roulette))
    errors = torch.stack([drawn_gradient(layer, x) for _ in range(DRAWS)]) - exact_gradient(
        layer, x
    )
    mean = errors.mean(0)
    scores = mean / (errors.std(0) / DRAWS**0.5)
    assert scores.abs().max() < 5.5
    assert 0.5 < scores.square().mean() < 1.5
    layer.debias = Debias()  # what the learned inverse alone gives is far from it
    assert mean.norm() < (drawn_gradient(layer, x) - exact_gradient(layer, x)).norm() / 3


def test_only_the_weight_in_training_is_corrected():
    layer, _ = conv_layer(2, 2, (5, 5))
    plain, _ = conv_layer(0, 2, (5, 5))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)

    def run(layer):
        leaf = x.clone().requires_grad_()
        z, log_det, recon = layer(leaf)
        (z.square().sum() - log_det.sum() + recon.sum()).backward()
        return z, log_det, recon, leaf.grad, layer.weight_inv.grad, layer.weight.grad

    ours, theirs = run(layer), run(plain)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(ours[-1], theirs[-1])
    assert (layer(x).log_det == 0).all()
    layer.eval()
    plain.eval()
    torch.testing.assert_close(layer(x).log_det, plain(x).log_det)
    before = torch.get_rng_state()
    layer(x)
    with torch.no_grad():
        layer.train()(x)
    assert torch.equal(before, torch.get_rng_state())  # no probe was drawn


def test_the_same_generator_gives_the_same_gradient():
    layer, x = linear_layer(2)
    gradients = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        gradients.append(drawn_gradient(layer, x))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_guard_where_the_series_diverges():
    layer, x = linear_layer(4, error=3.0)
    with torch.no_grad():  # E = -2 I
        layer.weight_inv.copy_(3 * torch.linalg.inv(layer.weight))
    assert layer.growth is None
    got = drawn_gradient(layer, x)
    torch.testing.assert_close(got, len(x) / 2 * layer.weight_inv.T.detach())
    assert layer.growth.item() == pytest.approx(2.0)


def test_growth_estimates_the_norm_of_the_error():
    weight = torch.eye(50, dtype=torch.float64)
    v = signs((3, 50), weight)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    scales = [1.0, 1.0, 2.0]
    gradient, growth = ops.debias_linear(v, weight, 0.7 * weight, scales, 0.5)
    assert growth.item() == pytest.approx(0.3)
    u = 0.7 * v * (0.3 + 0.3**2 + 2 * 0.3**3)
    torch.testing.assert_close(gradient, 0.5 / 3 * v.T @ u)


def test_roulette_adds_terms_that_make_up_for_the_missing():
    assert scales_of(Debias(3)) == [1.0, 1.0, 1.0]
    torch.manual_seed(0)
    drawn = [scales_of(Debias(2, roulette=0.6)) for _ in range(4000)]
    for s in drawn:
        assert s == pytest.approx([1.0, 1.0, *(0.6**-k for k in range(1, len(s) - 1))])
    for term in (2, 3, 4):  # in the mean each counts once
        counts = np.array([s[term] if len(s) > term else 0.0 for s in drawn])
        assert abs(counts.mean() - 1) < 4 * counts.std() / len(drawn) ** 0.5


# name: shapes of v, weight and weight_inv, and the geometry.
CONVOLUTIONS = {
    "one-channel": ((4, 1, 9, 7), (1, 1, 3, 3), (1, 1, 3, 3), (1, 1, False)),
    "larger-inverse": ((3, 4, 6, 6), (4, 4, 3, 3), (4, 4, 7, 5), (1, 1, False)),
    "smaller-inverse": ((3, 3, 6, 6), (3, 3, 5, 5), (3, 3, 3, 3), (1, 1, True)),
    "groups-dilation": ((2, 6, 8, 5), (6, 2, 3, 3), (6, 2, 3, 3), (2, 3, False)),
    "kernel-past-the-image": ((2, 2, 2, 3), (2, 2, 7, 7), (2, 2, 5, 5), (1, 1, False)),
    "many-channels": ((2, 70, 3, 3), (70, 70, 3, 3), (70, 70, 1, 1), (1, 1, False)),
    "sixteen-channels": ((5, 16, 7, 7), (16, 16, 3, 3), (16, 16, 3, 3), (1, 1, False)),
}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}


def drawn_convolution(name, dtype, device="cpu"):
    """Probes, w near the identity, and r near its inverse; the geometry."""
    size, weight, inverse, geometry = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(3)
    kernels = []
    for shape in (weight, inverse):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise *= 0.15 / (shape[1] * shape[2] * shape[3]) ** 0.5
        kernels.append(noise + torch.nn.init.dirac_(torch.empty(shape).double(), geometry[1]))
    v = torch.randn(size, generator=generator, dtype=torch.float64).sign()
    return tuple(t.to(device, dtype) for t in (v, *kernels)), geometry


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operator_equals_dense_matrices(name, dtype, backend, device):
    if backend == "native" and not snf_ext.build_info()["cpp"]:
        pytest.skip("the native backend is not built")
    (v, weight, inverse), geometry = drawn_convolution(name, dtype, device)
    module = torch.ops.snf_ext if backend == "native" else reference
    scales = [1.0, 1.0, 1.5]
    gradient, growth = module.debias_conv2d(v, weight, inverse, *geometry, scales, 0.5)
    extent = (tuple(v.shape[2:]), *geometry)
    w, r = (ground_truth.conv_matrix(k.cpu().double(), *extent) for k in (weight, inverse))
    probes = v.cpu().double().flatten(1).numpy().T
    e = np.eye(len(w)) - w @ r
    powers = [np.linalg.matrix_power(e, k) @ probes for k in range(4)]
    u = r @ sum(s * p for s, p in zip(scales, powers[1:], strict=True))
    want = 0.5 / len(v) * ground_truth.onto_kernel(probes @ u.T, tuple(weight.shape), *extent)
    assert gradient.shape == weight.shape
    assert (
        gradient.dtype == growth.dtype == (torch.float64 if dtype.itemsize == 8 else torch.float32)
    )
    error = np.abs(gradient.cpu().double().numpy() - want).max() / np.abs(want).max()
    assert error < TOLERANCE[dtype]
    ratio = np.linalg.norm(powers[3]) / np.linalg.norm(powers[2])
    assert growth.item() == pytest.approx(ratio, rel=TOLERANCE[dtype])


@pytest.mark.skipif(not snf_ext.build_info()["cpp"], reason="the native backend is not built")
def test_operators_pass_opcheck():
    (v, weight, inverse), geometry = drawn_convolution("groups-dilation", torch.float32)
    native = torch.ops.snf_ext
    torch.library.opcheck(
        native.debias_conv2d.default, (v, weight, inverse, *geometry, [1.0, 2.0], 0.5)
    )
    matrix = torch.eye(4)
    signed = signs((2, 4), matrix)
    torch.library.opcheck(native.debias_linear.default, (signed, matrix, matrix / 2, [1.0], 1.0))
    log_det, weight = torch.zeros(3, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    torch.library.opcheck(native.with_gradient.default, (log_det, weight, torch.randn(4, 4)))


def test_operator_does_not_depend_on_threads():
    (v, weight, inverse), geometry = drawn_convolution("sixteen-channels", torch.float32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(ops.debias_conv2d(v, weight, inverse, *geometry, [1.0, 1.0], 0.5)[0])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_operators_refuse_bad_arguments(backend):
    if backend == "native" and not snf_ext.build_info()["cpp"]:
        pytest.skip("the native backend is not built")
    (v, weight, inverse), geometry = drawn_convolution("one-channel", torch.float32)
    eye = torch.eye(3)
    with snf_ext.use_backend(backend):
        with pytest.raises(ValueError, match="scales must have a number for each term; got none"):
            ops.debias_conv2d(v, weight, inverse, *geometry, [], 0.5)
        with pytest.raises(ValueError, match=r"v must have at least one probe; got \[0, 1, 9, 7\]"):
            ops.debias_conv2d(v[:0], weight, inverse, *geometry, [1.0], 0.5)
        with pytest.raises(ValueError, match=r"v must have shape \[P, D\]; got \[3\]"):
            ops.debias_linear(torch.ones(3), eye, eye, [1.0], 0.5)


def test_leading_dimensions_and_scales():
    layer, _ = linear_layer(3, features=6)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    layer(x).log_det.sum().backward()
    whole = layer.weight.grad.clone()
    torch.manual_seed(1)
    layer.weight.grad = None
    (layer(x.flatten(0, 1)).log_det * 2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_and_compilation(dtype):
    layer = SelfNormConv2d(2, 3, debias=2).to(dtype)
    x = torch.randn(3, 2, 5, 4, dtype=dtype)
    compiled = torch.compile(lambda x: layer(x).log_det.sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    assert layer.weight.grad.dtype == dtype
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("debias", "text"),
    [
        (-1, r"debias\.terms must be an int of at least 0; got -1"),
        (1.5, r"debias\.terms must be an int of at least 0; got 1\.5"),
        (Debias(2, probes=0), r"debias\.probes must be an int of at least 1; got 0"),
        (Debias(2, roulette=1.0), r"debias\.roulette must be in \[0, 1\); got 1\.0"),
        (Debias(0, roulette=0.5), r"debias\.roulette must be 0 without terms"),
    ],
)
def test_errors(debias, text):
    for make in (
        lambda: SelfNormLinear(3, debias=debias),
        lambda: SelfNormConv2d(1, 3, debias=debias),
    ):
        with pytest.raises(ValueError, match=text):
            make()
