"""Composition: likelihood, loss, samples, and their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import Flow, SelfNormConv2d, SelfNormLinear, SmoothLeakyReLU


def small_flow(recon_weight=1.0, device="cpu"):
    flow = Flow(
        [
            SelfNormConv2d(1, 3),
            SmoothLeakyReLU(0.3),
            snf_ext.Squeeze(),
            SelfNormConv2d(4, 3),
            snf_ext.Flatten((4, 2, 3)),
            SelfNormLinear(24),
        ],
        event_shape=(1, 4, 6),
        recon_weight=recon_weight,
    ).double()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.05 * torch.randn_like(p)
    return flow.to(device)


def draw_events(count, device):
    return torch.randn(count, 1, 4, 6, dtype=torch.float64).to(device)


def test_log_prob_is_the_change_of_variables(backend, device):
    """Against the Jacobian of the whole flow, in training and in evaluation mode."""
    flow, x = small_flow(device=device), draw_events(3, device)
    for training in (True, False):
        log_prob = flow.train(training).log_prob(x)
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda row: flow(row[None]).z.flatten(), x[i]
            ).reshape(24, 24)
            z = flow(x[i : i + 1]).z.flatten()
            base = -0.5 * (z @ z).item() - 12 * math.log(2 * math.pi)
            want = base + torch.linalg.slogdet(jacobian).logabsdet.item()
            assert abs(log_prob[i].item() - want) < 1e-8


def test_loss_is_what_it_says(backend, device):
    flow, x = small_flow(3.0, device), draw_events(5, device)
    z, log_det, recon = flow(x)
    base = -0.5 * z.square().sum(1) - 12 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.loss(x), (-base - log_det + 3 * recon).mean())
    value, activations = x, x.new_zeros(5)
    for bijection in flow.bijections:
        value, own, _ = bijection(value)
        activations += own * (not hasattr(bijection, "weight_inv"))
    # In training the linear layers add nothing to the value.
    torch.testing.assert_close(log_det, activations)
    flow.eval()
    exact = -flow.log_prob(x).mean() + 3 * recon.mean()
    torch.testing.assert_close(flow.loss(x), exact)


def test_recon_is_each_layers_own(backend, device):
    flow, x = small_flow(device=device), draw_events(5, device)
    total = x.new_zeros(5)
    value = x
    for bijection in flow.bijections:
        z = bijection(value).z
        if hasattr(bijection, "weight_inv"):
            total += (bijection.inverse(z) - value).flatten(1).square().sum(1)
        value = z
    torch.testing.assert_close(flow(x).recon, total)


def test_samples_and_inverse(backend, device):
    flow, x = small_flow(device=device), draw_events(5, device)
    z = flow(x).z
    torch.testing.assert_close(flow.inverse(z, exact=True), x)
    assert flow.inverse(z).shape == x.shape
    for exact in (False, True):
        torch.manual_seed(7)
        sample = flow.sample(4, exact=exact, temperature=0.5)
        torch.manual_seed(7)
        noise = 0.5 * torch.randn(4, 24, dtype=torch.float64, device=device)
        assert sample.shape == (4, 1, 4, 6)
        assert not sample.requires_grad
        torch.testing.assert_close(sample, flow.inverse(noise, exact=exact))


def test_linear_over_leading_dimensions_sums_to_one_log_det():
    flow = Flow([SelfNormLinear(4)], event_shape=(3, 4)).double()
    with torch.no_grad():
        flow.bijections[0].weight.mul_(1.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    _, log_det, recon = flow.eval()(x)
    assert log_det.shape == recon.shape == (2,)
    torch.testing.assert_close(log_det[0], 3 * flow.bijections[0].log_abs_det())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.loss(torch.zeros(0, 1, 4, 6).double()), r"at least one sample; got \[0,"),
        (lambda f: f.loss(torch.zeros(3, 4, 6).double()), r"events \[1, 4, 6\]; got \[3, 4, 6\]"),
        (lambda f: f.log_prob(torch.zeros(()).double()), r"events \[1, 4, 6\]; got \[\]"),
        (lambda f: f.sample(-1), "count must not be negative; got -1"),
        (lambda f: f.sample(1, temperature=0), "temperature must be positive; got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_flow())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_recon_weight(weight):
    with pytest.raises(ValueError, match="recon_weight must be finite and not negative"):
        Flow([], (1,), recon_weight=weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["loss", "log_prob"])
def test_nan_in_the_data_is_named(method, bad, backend):
    x = torch.zeros(3, 1, 4, 6, dtype=torch.float64)
    x[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match="x must be finite; got NaN or inf in 1 of 3 samples"):
        getattr(small_flow(), method)(x)


def test_empty_flow_is_its_base():
    x = torch.randn(4, 3)
    want = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(Flow([], (3,)).log_prob(x), want)


@pytest.mark.parametrize("seed", range(2))
def test_compiled_loss_has_the_same_gradients(seed, backend, device):
    torch.compiler.reset()
    torch.manual_seed(seed)
    flow = Flow([SelfNormLinear(6), SmoothLeakyReLU(0.3), SelfNormLinear(6)], (6,)).to(device)
    x = torch.randn(4, 6, device=device)
    flow.loss(x).backward()
    want = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    torch.compile(flow.loss, fullgraph=True)(x).backward()
    for p, g in zip(flow.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_fc_model(backend, device):
    flow = snf_ext.models.fc().to(device)
    assert sum(p.numel() for p in flow.parameters()) == 2_460_192
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, device=device)
    flow.loss(images).backward()
    assert flow.log_prob(images).shape == (3,)
    sample = flow.sample(2)
    assert sample.shape == (2, 1, 28, 28)
    assert sample.min() >= 0
    assert sample.max() <= 255
    small = snf_ext.models.fc((1, 8, 8), layers=3, linear="exact", levels=17)
    assert sum(p.numel() for p in small.parameters()) == 3 * (64 * 64 + 64)
    with pytest.raises(ValueError, match="linear must be one of self_norm, exact; got 'lu'"):
        snf_ext.models.fc(linear="lu")
    with pytest.raises(ValueError, match="layers must be at least 1; got 0"):
        snf_ext.models.fc(layers=0)


def test_likelihood_of_images_counts_the_preprocessing():
    """A flow that learned nothing but uniform pixels: log p(x) = -D log(levels)."""
    preprocessing = snf_ext.models.preprocessing(16)
    flow = Flow(preprocessing, (1, 2, 2)).double()
    images = torch.randint(0, 16, (4000, 1, 2, 2)).double()
    z, log_det, _ = flow(images)
    logistic = (-z - 2 * torch.nn.functional.softplus(-z)).flatten(1).sum(1)
    # The logit of a uniform number is logistic, up to the squeeze of 1e-6.
    np.testing.assert_allclose(logistic + log_det, -4 * math.log(16), atol=1e-3)
