"""The papers' architectures: the table of the paper to the parameter, and what every one can do."""

from __future__ import annotations

import math

import pytest
import torch
from models_table import MIXINGS, SMALL, VARIANTS, build, images

import snf_ext
from snf_ext import models
from snf_ext.bijection import walk


def count(flow) -> int:
    return sum(p.numel() for p in flow.parameters())


def kinds(flow, kind) -> list:
    return [m for m in flow.modules() if isinstance(m, kind)]


every = pytest.mark.parametrize("name", VARIANTS)


def test_parameters_of_the_paper():
    assert count(models.fc()) == 2_460_192
    assert count(models.conv()) == 102_613


def test_layers_of_the_convolutional_model():
    flow = models.conv()
    layers = kinds(flow, snf_ext.SelfNormConv2d)
    assert [layer.shape.channels for layer in layers] == [1] * 3 + [4] * 3 + [16] * 3
    assert len(kinds(flow, snf_ext.RationalQuadraticSpline)) == 8
    assert len(kinds(flow, snf_ext.Squeeze)) == 2
    assert flow.latent_shape == (16, 7, 7)
    assert type(flow.bijections[-1]) is snf_ext.SelfNormConv2d
    for layer in layers:
        channels = layer.shape.channels
        dirac = torch.nn.init.dirac_(torch.empty(layer.weight.shape))
        noise = (layer.weight - dirac).std().item()
        if channels == 16:  # enough numbers for a standard deviation
            assert 0.8 < noise / (0.01 * math.sqrt(2 / (2 * 9 * channels))) < 1.2
        torch.testing.assert_close(
            layer.weight_inv, layer.weight.flip(2, 3).transpose(0, 1), rtol=0, atol=0
        )


@pytest.mark.parametrize("mixing", ["self_norm", "plain", "lu"])
def test_layers_of_glow(mixing):
    levels, steps, width = 2, 3, 16
    flow = models.glow((1, 28, 28), levels, steps, width, mixing)
    assert len(kinds(flow, snf_ext.ActNorm)) == levels * steps
    assert len(kinds(flow, snf_ext.AffineCoupling)) == levels * steps + 1  # the split prior's
    assert flow.latent_shape == (784,)

    def coupling(channels):
        kept, changed = channels // 2, channels - channels // 2
        first = 9 * kept * width + width
        last = 9 * width * 2 * changed + 2 * 2 * changed  # weights, biases, logarithms of scales
        return first + width * width + width + last

    def mix(c):
        return {"self_norm": 2 * c * c + c, "plain": c * c + c, "lu": c * c + 2 * c}[mixing]

    want = coupling(4)  # split prior
    for channels in (4, 8):  # 4x14x14, half of it squeezed to 8x7x7
        want += steps * (2 * channels + mix(channels) + coupling(channels))
    assert count(flow) == want


def test_glow_starts_at_random_orthogonal_matrices():
    for name in ("self_norm", "exact", "plain"):
        flow = models.glow(SMALL, 1, 2, 8, name)
        for layer in flow.modules():
            if getattr(layer, "mixing", False):
                matrix = layer.weight.detach().reshape(4, 4)
                torch.testing.assert_close(matrix @ matrix.T, torch.eye(4), rtol=0, atol=1e-5)
                assert (matrix - torch.eye(4)).abs().max() > 0.1
    layer = kinds(models.glow(SMALL, 1, 1, 8, "self_norm", 5), snf_ext.SelfNormConv2d)[0]
    assert layer.weight.shape == (4, 4, 5, 5)
    torch.testing.assert_close(layer.weight_inv, layer.weight.flip(2, 3).transpose(0, 1))


def test_compared_variants_differ_in_the_mixing_layer_alone():
    """Biases alike: every variant has one for each channel or feature of each mixing layer."""
    for names in (["fc-self_norm", "fc-exact", "fc-relative"], [f"glow-{m}" for m in MIXINGS]):
        rest = []
        for name in names:
            flow = VARIANTS[name]()
            walked = walk(flow.bijections, flow.event_shape)
            mixing = [(m, shape) for m, shape in walked if m.mixing]
            assert mixing
            for m, shape in mixing:
                biases = [p.numel() for n, p in m.named_parameters() if n.split(".")[-1] == "bias"]
                assert biases == [shape[0]]
            own = {id(p) for m, _ in mixing for p in m.parameters()}
            rest.append(sum(p.numel() for p in flow.parameters() if id(p) not in own))
        assert len(set(rest)) == 1


@every
def test_exact_inverse_and_training_step(name):
    flow, x = build(name), images()
    loss = flow.train().loss(x)
    loss.backward()
    missing = [
        n for n, p in flow.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not missing
    flow.eval()
    with torch.no_grad():
        before = list(flow.bijections)[:1]
        u = before[0](x).z  # past the dequantization, which draws noise
        z = u
        for bijection in list(flow.bijections)[1:]:
            z = bijection(z).z
        assert tuple(z.shape[1:]) == flow.latent_shape
        back = z
        for bijection in reversed(list(flow.bijections)[1:]):
            back = bijection.inverse(back, exact=True)
        assert (back - u).abs().max() < 1e-6 * 256
        assert flow.sample(2, temperature=0.7, exact=True).shape == (2, *SMALL)


@pytest.mark.parametrize(
    "name", ["fc-relative", "conv-self_norm", "conv-emerging", "glow-self_norm"]
)
def test_log_prob_is_the_change_of_variables(name):
    flow, x = build(name).eval(), images(1)
    torch.manual_seed(5)
    log_prob = flow.log_prob(x)
    torch.manual_seed(5)
    u = flow.bijections[0](x).z
    rest = list(flow.bijections)[1:]

    def push(row):
        for bijection in rest:
            row = bijection(row).z
        return row.flatten()

    jacobian = torch.autograd.functional.jacobian(push, u).reshape(64, 64)
    z = push(u)
    want = -0.5 * (z @ z) - 32 * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_prob[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["fc-self_norm", "conv-self_norm", "glow-self_norm", "glow-additive"]
)
def test_conditional(name):
    flow = build(name, context_features=3).eval()
    x, context = images(), torch.eye(3, dtype=torch.float64)
    torch.manual_seed(1)
    first = flow.log_prob(x, context)
    torch.manual_seed(1)
    other = flow.log_prob(x, context.roll(1, 0))
    assert (first - other).abs().min() > 1e-3, "the context must matter"
    z = torch.randn(3, *flow.latent_shape, dtype=torch.float64)
    assert (flow.inverse(z, context) - flow.inverse(z, context.roll(1, 0))).abs().max() > 0
    flow.train().loss(x, context).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_temperature_reaches_every_scale():
    flow = build("glow-lu").eval()
    with torch.no_grad():
        centre = flow.inverse(torch.zeros(1, 64, dtype=torch.float64))
        cold = flow.sample(4, temperature=1e-12)
    torch.testing.assert_close(cold, centre.expand(4, *SMALL), rtol=0, atol=1.0)


def test_penalty_reaches_layers_behind_a_split():
    flow, x = build("glow-lu"), images(2)
    torch.manual_seed(0)
    plain = flow.loss(x)
    torch.manual_seed(0)
    more = flow.loss(x, log_det_penalty=1.0) - plain
    layers = kinds(flow, snf_ext.LUConv1x1)
    assert len(layers) == 4
    pixels = {4: 16, 8: 4}
    want = sum((pixels[m.shape.channels] * m.log_s.sum()) ** 2 for m in layers)
    torch.testing.assert_close(more, want.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.fc(linear="no"), "linear must be one of self_norm, exact, relative; got"),
        (lambda: models.fc(layers=0), "layers must be at least 1; got 0"),
        (lambda: models.conv(conv="lu"), "conv must be one of self_norm, .*; got 'lu'"),
        (lambda: models.conv(layers=8), "layers must be a multiple of blocks = 3; got 8"),
        (lambda: models.conv((1, 6, 8)), r"H and W divisible by 4; got \(1, 6, 8\)"),
        (lambda: models.conv((8, 8)), r"event_shape must be \(C, H, W\)"),
        (lambda: models.conv(activation="relu"), "activation must be one of spline, "),
        (
            lambda: models.conv(conv="exact", inverse_kernel_size=5),
            "inverse_kernel_size must be None for 'exact', which learns no inverse; got 5",
        ),
        (lambda: models.glow(mixing="no"), "mixing must be one of self_norm, .*householder; got"),
        (lambda: models.glow(mixing="lu", kernel_size=3), "kernel_size must be 1 .* got 3"),
        (lambda: models.glow(coupling="no"), "coupling must be one of affine, additive; got"),
        (lambda: models.glow(levels=3), r"divisible by 8; got \(1, 28, 28\)"),
        (lambda: models.glow(steps=0), "steps must be at least 1; got 0"),
        (
            lambda: models.glow(mixing="plain", inverse_kernel_size=3),
            "inverse_kernel_size must be None for 'plain'",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
