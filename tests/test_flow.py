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
    small = snf_ext.models.fc((1, 8, 8), layers=3, linear="exact", pixel_levels=17)
    assert sum(p.numel() for p in small.parameters()) == 3 * (64 * 64 + 64)
    with pytest.raises(ValueError, match=r"linear must be one of self_norm, .*; got 'lu'"):
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


def test_log_det_penalty_is_that_of_dense_determinants(backend, device):
    """Value: over linear and convolution layers alone. Gradient: exact for an exact layer."""
    flow, x = small_flow(device=device), draw_events(5, device)
    linear = snf_ext.ExactLinear(24).double().to(device)
    flow.bijections.append(linear)
    dense = linear.weight.detach().clone().requires_grad_()
    own = torch.linalg.slogdet(dense).logabsdet
    others = [flow.bijections[0].log_abs_det((4, 6)), flow.bijections[3].log_abs_det((2, 3))]
    others.append(flow.bijections[5].log_abs_det())
    want = own.square() + sum(value.square() for value in others)

    plain, penalised = flow.loss(x), flow.loss(x, log_det_penalty=0.3)
    torch.testing.assert_close(penalised - plain, 0.3 * want.detach(), rtol=1e-8, atol=1e-10)
    (got,) = torch.autograd.grad(penalised - plain, linear.weight)
    (expected,) = torch.autograd.grad(0.3 * want, dense)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-10)
    for parameter in flow.bijections[0].parameters():
        assert parameter.grad is None


def test_log_det_penalty_pulls_learned_layers_towards_volume_preservation(backend):
    layer = SelfNormLinear(4).double()
    with torch.no_grad():
        layer.weight.copy_(3 * torch.eye(4))
        layer.weight_inv.copy_(torch.eye(4) / 3)
    flow, x = Flow([layer], (4,)), torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(
        flow.loss(x, log_det_penalty=1.0) - flow.loss(x), layer.weight
    )
    # d (log det)^2 = 2 log det W^-T; the learned inverse's gradient is half of W^-T.
    want = 4 * math.log(3) * torch.eye(4, dtype=torch.float64) / 3
    torch.testing.assert_close(gradient, want)


def test_bits_per_dim_divides_all_but_the_penalty(backend):
    flow, x = small_flow(), draw_events(5, "cpu")
    bits = flow.loss(x, bits_per_dim=True)
    torch.testing.assert_close(bits, flow.loss(x) / (24 * math.log(2)))
    penalty = flow.loss(x, log_det_penalty=0.1) - flow.loss(x)
    both = flow.loss(x, log_det_penalty=0.1, bits_per_dim=True)
    torch.testing.assert_close(both - bits, penalty)


class Shift(snf_ext.Bijection):
    """Takes the context off: z = x - context."""

    def forward(self, x, context=None):
        zeros = x.new_zeros(len(x))
        return snf_ext.FlowStep(x - context, zeros, zeros)

    def inverse(self, z, context=None, exact=False):
        return z + context


def test_context_reaches_every_bijection():
    flow = Flow([Shift(), SelfNormLinear(3), Shift()], (3,), context_features=3)
    x, context = torch.randn(4, 3), torch.randn(4, 3)
    z = flow(x, context).z
    inner = flow.bijections[1]
    torch.testing.assert_close(z, inner(x - context).z - context)
    torch.testing.assert_close(flow.inverse(z, context, exact=True), x, rtol=1e-4, atol=1e-5)
    assert flow.log_prob(x, context).shape == (4,)
    one = torch.randn(3)
    torch.manual_seed(1)
    alike = flow.sample(5, one)
    torch.manual_seed(1)
    torch.testing.assert_close(alike, flow.sample(5, one.expand(5, 3)))


@pytest.mark.parametrize(
    ("features", "call", "message"),
    [
        (2, lambda f, x: f.loss(x), r"context must have shape \[B, K\] = \[3, 2\]; got none"),
        (2, lambda f, x: f.log_prob(x, x), r"= \[3, 2\]; got \[3, 4\]"),
        (2, lambda f, x: f.sample(5, x), r"= \[5, 2\]; got \[3, 4\]"),
        (0, lambda f, x: f.loss(x, x), r"context must not be given .* are 0; got \[3, 4\]"),
        (0, lambda f, x: f.loss(x, log_det_penalty=-1.0), "log_det_penalty must be .* got -1.0"),
    ],
)
def test_bad_context_and_penalty(features, call, message):
    flow = Flow([SelfNormLinear(4)], (4,), context_features=features)
    with pytest.raises(ValueError, match=message):
        call(flow, torch.randn(3, 4))


def test_bad_context_features():
    with pytest.raises(ValueError, match="context_features must not be negative; got -1"):
        Flow([SelfNormLinear(4)], (4,), context_features=-1)
