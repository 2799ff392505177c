"""Flows as distributions of torch.distributions."""

from __future__ import annotations

import pytest
import torch
from numerical import directional
from torch.distributions import (
    Independent,
    constraints,
)

import snf_ext
from snf_ext import FlowDistribution


def vector_flow(context_features=0):
    torch.manual_seed(2)
    parts = [
        snf_ext.SelfNormLinear(4, inverse="tracked"),
        snf_ext.RationalQuadraticSpline((4,), tail_bound=3.0),
        snf_ext.AffineCoupling(4, 8, mask="vector", context_features=context_features),
        snf_ext.SelfNormLinear(4),
    ]
    return off_the_start(snf_ext.Flow(parts, (4,), context_features=context_features))


def image_flow(context_features=0):
    torch.manual_seed(2)
    parts = [
        snf_ext.SelfNormConv2d(2, 3),
        snf_ext.Squeeze(),
        snf_ext.ActNorm(8),
        snf_ext.SplitPrior(
            (8, 2, 2), [snf_ext.SmoothLeakyReLU()], 4, context_features=context_features
        ),
    ]
    return off_the_start(snf_ext.Flow(parts, (2, 4, 4), context_features=context_features))


def off_the_start(flow):
    flow = flow.double()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    return flow.eval()


FLOWS = pytest.mark.parametrize("make", [vector_flow, image_flow])


@FLOWS
@pytest.mark.parametrize("sample_shape", [(), (6,), (2, 3), (0,)])
def test_samples_carry_their_own_density(make, sample_shape):
    flow = make()
    q = flow.as_distribution()
    assert (q.batch_shape, q.event_shape) == ((), flow.event_shape)
    torch.manual_seed(5)
    x, log_prob = q.rsample_and_log_prob(sample_shape)
    assert x.shape == (*sample_shape, *flow.event_shape)
    assert log_prob.shape == sample_shape
    torch.testing.assert_close(log_prob, q.log_prob(x))
    flat = x.reshape(-1, *flow.event_shape)
    torch.testing.assert_close(log_prob.reshape(-1), flow.log_prob(flat))
    for draw in (q.rsample, q.sample):  # the same noise
        torch.manual_seed(5)
        torch.testing.assert_close(draw(sample_shape), x)
    assert x.requires_grad
    assert not q.sample(sample_shape).requires_grad
    if x.numel():  # torch's check takes no empty batch
        assert q.support.check(x).all()


@FLOWS
def test_gradients_of_samples_reach_the_flow(make):
    """Numerically, for what has whole gradients; with a context, into it too."""
    flow = make(3)
    context = torch.randn(2, 3).double().requires_grad_()
    q = flow.as_distribution(context)
    weights = torch.randn(5, 2, *flow.event_shape).double()

    def value():
        torch.manual_seed(4)
        x, log_prob = q.rsample_and_log_prob((5,))
        return (weights * x).sum() + log_prob.sum() * 0

    learn = {name: p for name, p in flow.named_parameters() if p.requires_grad}
    leaves = {"context": context, **learn}
    got = torch.autograd.grad(value(), list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        if name.endswith("weight_inv"):
            continue
        numerical, direction = directional(value, leaf)
        module = flow.get_submodule(name.rpartition(".")[0])
        halved = name.endswith(".weight") and hasattr(module, "upkeep")
        share = 0.5 if halved and isinstance(module.upkeep, snf_ext.Penalty) else 1.0
        ours = (gradient * direction).sum().item()
        assert ours == pytest.approx(share * numerical, rel=1e-5, abs=1e-6), name


@FLOWS
def test_a_context_is_a_batch_shape(make):
    flow = make(3)
    context = torch.randn(5, 3).double()
    q = flow.as_distribution(context)
    assert q.batch_shape == (5,)
    x = q.sample((2,))
    assert x.shape == (2, 5, *flow.event_shape)
    want = torch.stack([flow.log_prob(row, context) for row in x])
    torch.testing.assert_close(q.log_prob(x), want)
    torch.testing.assert_close(q.log_prob(x[0]), want[0])
    # One event under each context
    one = x[0, :1].expand(5, *flow.event_shape)
    torch.testing.assert_close(q.log_prob(x[0, 0]), flow.log_prob(one, context))
    grid = flow.as_distribution(context[:, None]).expand((5, 2))
    assert grid.sample().shape == (5, 2, *flow.event_shape)
    single = flow.as_distribution(context[1])
    assert single.batch_shape == ()
    torch.testing.assert_close(single.log_prob(x[0, 1]), want[0, 1])


@FLOWS
def test_expand(make):
    flow = make()
    q = flow.as_distribution().expand((3, 2))
    assert (q.batch_shape, q.event_shape) == ((3, 2), flow.event_shape)
    x = q.sample((4,))
    assert x.shape == (4, 3, 2, *flow.event_shape)
    assert x.flatten(0, 2).unique(dim=0).shape[0] == 24
    want = flow.log_prob(x.flatten(0, 2)).reshape(4, 3, 2)
    torch.testing.assert_close(q.log_prob(x), want)
    assert q.log_prob(x[0, 0, 0]).shape == (3, 2)
    outer = Independent(q, 1)
    torch.testing.assert_close(outer.log_prob(x), want.sum(-1))


def test_values_are_exact_in_training_mode():
    flow = vector_flow()
    x = torch.randn(6, 4).double()
    want = flow.log_prob(x).detach()
    torch.testing.assert_close(flow.train().as_distribution().log_prob(x), want)
    assert (flow(x).log_det - want).abs().min() > 0.1  # which is a surrogate there


def test_training_by_log_prob_keeps_tracked_inverses_up():
    layer = snf_ext.SelfNormLinear(4, inverse="tracked")
    q = snf_ext.Flow([layer], (4,)).as_distribution()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    data = torch.randn(256, 4) @ torch.randn(4, 4)
    for _ in range(20):
        optimizer.zero_grad()
        (-q.log_prob(data).mean()).backward()
        gradient = layer.weight.grad
        residual = (data @ layer.weight.T + layer.bias).T @ data / len(data)
        exact = (residual - torch.linalg.inv(layer.weight).T).detach()
        torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-4)
        optimizer.step()


def test_learned_inverses_on_request():
    flow = vector_flow()
    q = flow.as_distribution(exact=False)
    torch.manual_seed(3)
    x = q.rsample((6,))
    torch.manual_seed(3)
    noise = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(x, flow.inverse(noise))
    assert (x - flow.inverse(noise, exact=True)).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(x.sum(), flow.bijections[-1].weight_inv)
    assert gradient.any()
    torch.manual_seed(3)
    x, log_prob = q.rsample_and_log_prob((6,))
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    # These are not the densities of the samples.
    assert (log_prob - flow.as_distribution().rsample_and_log_prob((6,))[1]).abs().max() > 1e-3


def test_pixels():
    flow = snf_ext.models.fc((1, 2, 2), pixel_levels=17)
    q = flow.as_distribution()
    assert not q.has_rsample
    inner = q.support.base_constraint
    assert (inner.lower_bound, inner.upper_bound) == (0, 16)
    assert q.support.event_dim == 3
    x = q.sample((50,))
    assert q.support.check(x).all()
    torch.manual_seed(1)
    log_prob = q.log_prob(x)
    torch.manual_seed(1)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    for draw in (q.rsample, q.rsample_and_log_prob):
        with pytest.raises(NotImplementedError, match=r"rsample must have real .* integers"):
            draw()
    checked = snf_ext.FlowDistribution(flow, validate_args=True)  # zuko's import turns it off
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(x + 0.5)


def test_an_interval():
    parts = [snf_ext.Normalize(0.0, -4.0), snf_ext.Flatten((1, 2)), snf_ext.Logit(1e-3)]
    flow = snf_ext.Flow([*parts, snf_ext.ComponentwiseAffine((2,))], (1, 2))
    q = flow.as_distribution()
    assert q.has_rsample
    x = q.rsample((1000,))
    inner = q.support.base_constraint
    assert inner.lower_bound == pytest.approx(-4 - 4 * 1e-3 / 0.998)
    assert inner.upper_bound == pytest.approx(4 * 1e-3 / 0.998)
    assert q.support.check(x).all()
    checked = snf_ext.FlowDistribution(flow, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(torch.full((1, 2), 1.0))
    assert vector_flow().as_distribution().support.base_constraint is constraints.real


def test_density_integrates_to_one():
    """On a grid, of a flow with a bounded support and one without."""
    flow = snf_ext.Flow([snf_ext.Logit(0.05), snf_ext.SelfNormLinear(2)], (2,)).double()
    inner = flow.as_distribution().support.base_constraint
    ticks = torch.linspace(inner.lower_bound, inner.upper_bound, 802).double()[1:-1]
    grid = torch.cartesian_prod(ticks, ticks)
    total = flow.as_distribution().log_prob(grid).exp().sum() * (ticks[1] - ticks[0]) ** 2
    assert total.item() == pytest.approx(1, abs=2e-3)


def test_what_cannot_be_used():
    flow = vector_flow(3)
    with pytest.raises(
        ValueError, match=r"context must have shape \[..., K\] with K = 3; got none"
    ):
        flow.as_distribution()
    with pytest.raises(ValueError, match=r"K = 3; got \[5, 2\]"):
        flow.as_distribution(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"K = 0; got \[5, 2\]"):
        vector_flow().as_distribution(torch.zeros(5, 2))
    with pytest.raises(TypeError, match=r"flow must be a snf_ext.Flow; got Linear"):
        FlowDistribution(torch.nn.Linear(2, 2))
    q = vector_flow().as_distribution()
    with pytest.raises(ValueError, match=r"value must have shape \[..., 4\]; got \[3\]"):
        q.log_prob(torch.zeros(3))
    for name in ("mean", "variance"):
        with pytest.raises(NotImplementedError):
            getattr(q, name)
    assert repr(q) == "FlowDistribution(batch_shape=(), event_shape=(4,), exact=True)"


def test_actnorm_must_have_started():
    flow = snf_ext.Flow([snf_ext.ActNorm(3)], (3,))
    q = flow.as_distribution()
    assert q.sample((2,)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="ActNorm must have started"):
        q.rsample((2,))
    snf_ext.initialize(flow, [torch.randn(20, 3)])
    assert q.rsample((2,)).requires_grad
