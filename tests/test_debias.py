"""The debiased gradient: its mean is the exact gradient, its value and its limits."""

from __future__ import annotations

import ground_truth
import numpy as np
import pytest
import torch

from snf_ext import Debias, SelfNormConv2d, SelfNormLinear
from snf_ext.layers.debias import correction, signs

DRAWS = 4000


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
        start = SelfNormConv2d(channels, 3, groups=groups)
        del start
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


@pytest.mark.parametrize("how", [Debias(8), Debias(2, roulette=0.7)], ids=["K=8", "roulette"])
@pytest.mark.parametrize("name", LAYERS)
def test_mean_is_the_exact_gradient(name, how):
    """4,000 single probes: the mean is within its standard errors of the exact gradient."""
    layer, x = LAYERS[name](how)
    want = exact_gradient(layer, x)
    count, mean, square = 0, torch.zeros_like(want), torch.zeros_like(want)
    for _ in range(DRAWS):
        got = drawn_gradient(layer, x) - want
        count += 1
        mean += got
        square += got.square()
    mean /= count
    standard_error = ((square / count - mean.square()) / count).sqrt()
    scores = mean / standard_error
    assert scores.abs().max() < 3 + 2 * (want.numel() > 100)
    assert scores.square().mean() < 1.5
    # What the learned inverse alone gives is far from it.
    layer.debias = Debias()
    bias = (drawn_gradient(layer, x) - want).norm()
    assert mean.norm() < bias / 3


@pytest.mark.parametrize("name", LAYERS)
def test_terms_shrink_the_bias(name):
    """With all of a basis for probes there is no noise: what is left is the series' remainder."""
    errors = []
    for terms in (0, 1, 2, 4):
        layer, x = LAYERS[name](0)
        want = exact_gradient(layer, x)
        if terms:
            layer.debias = Debias(terms, probes=20_000)
        torch.manual_seed(3)
        errors.append((drawn_gradient(layer, x) - want).norm() / want.norm())
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1] * 1.2
    assert errors[3] < 0.5 * errors[0]


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
