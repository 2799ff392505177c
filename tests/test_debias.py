"""The debiased gradient: its mean is the exact gradient, its value and its limits."""

from __future__ import annotations

import ground_truth
import numpy as np
import pytest
import torch

from snf_ext import Debias, SelfNormConv2d, SelfNormLinear
from snf_ext.layers import self_norm
from snf_ext.layers.debias import correction, signs

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
    got = drawn_gradient(layer, x)
    torch.testing.assert_close(got, len(x) / 2 * layer.weight_inv.T.detach())


def test_growth_estimates_the_norm_of_the_error():
    weight = torch.eye(50, dtype=torch.float64)
    inverse = 0.7 * torch.eye(50, dtype=torch.float64)
    v = signs((3, 50), weight)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    found = correction(v, lambda x: x @ weight.T, lambda y: y @ inverse.T, Debias(5))
    assert found.growth.item() == pytest.approx(0.3)
    torch.testing.assert_close(found.u, 0.7 * v * sum(0.3**k for k in range(1, 6)))


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
