"""Bijections as transforms and flows as distributions of torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from bijections_table import BIJECTIONS
from torch.distributions import (
    Independent,
    Normal,
    TransformedDistribution,
    Uniform,
    constraints,
)

import snf_ext
from snf_ext import BijectionTransform, FlowDistribution
from snf_ext.implicit import exact_inverse

QUIET = [case for case in BIJECTIONS if not case.noisy]
NOISY = [case for case in BIJECTIONS if case.noisy]
every_quiet = pytest.mark.parametrize("case", QUIET, ids=lambda case: case.name)
every_noisy = pytest.mark.parametrize("case", NOISY, ids=lambda case: case.name)


def transform_of(case, bijection, x, **settings):
    context = case.context(x)
    dims = 1 if case.context_shape is None else len(case.context_shape)
    return BijectionTransform(bijection, case.event_shape, context, context_dims=dims, **settings)


def standard_normal(shape):
    return Independent(Normal(torch.zeros(shape).double(), 1.0), len(shape))


def normal_log_prob(z):
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def log_abs_det(function, row):
    """That of autograd's Jacobian of ``function``, of one event to one event."""
    jacobian = torch.autograd.functional.jacobian(lambda r: function(r[None]).flatten(), row)
    return torch.linalg.slogdet(jacobian.reshape(jacobian.shape[0], -1)).logabsdet


# Transforms


@every_quiet
def test_density_of_data_in_a_transformed_distribution(case):
    bijection, x = case.build(), case.data(3)
    transform = transform_of(case, bijection, x)
    density = TransformedDistribution(standard_normal(transform.latent_shape), transform.inv)
    assert density.event_shape == case.event_shape
    assert density.batch_shape == (() if case.context_shape is None else (3,))
    bijection.eval()
    context = case.context(x)
    z = bijection(x, context).z.detach()
    want = normal_log_prob(z) + torch.stack(
        [
            log_abs_det(lambda row, c=c: bijection(row, c).z, row)
            for row, c in zip(x, [None] * 3 if context is None else context[:, None], strict=True)
        ]
    )
    torch.testing.assert_close(density.log_prob(x), want, rtol=0, atol=1e-8)
    torch.testing.assert_close(density.log_prob(x[None].expand(2, *x.shape))[1], want)
    samples = density.sample((2,) if density.batch_shape else (2, 3))
    assert samples.shape == (2, 3, *case.event_shape)
    assert density.support.check(samples).all()
    torch.testing.assert_close(
        normal_log_prob(transform(samples)[0]) + transform.log_abs_det_jacobian(samples, None)[0],
        density.log_prob(samples)[0],
    )
    bijection.train()  # values are exact in either mode
    torch.testing.assert_close(density.log_prob(x), want, rtol=0, atol=1e-8)


@every_quiet
def test_noise_pushed_forward_in_a_transformed_distribution(case):
    """The other way round: the call makes samples, and the density of these is exact."""
    bijection, x = case.build().eval(), case.data(2)
    transform = transform_of(case, bijection, x)
    base = standard_normal(case.event_shape)
    if case.unit_interval:
        zero = torch.zeros(case.event_shape).double()
        base = Independent(Uniform(zero, zero + 1), len(case.event_shape))
    density = TransformedDistribution(base, transform)
    z, context = transform(x), case.context(x)
    want = base.log_prob(x) - torch.stack(
        [
            log_abs_det(lambda row, c=c: bijection(row, c).z, row)
            for row, c in zip(x, [None] * 2 if context is None else context[:, None], strict=True)
        ]
    )
    torch.testing.assert_close(density.log_prob(z.detach()), want, rtol=0, atol=1e-7)


@every_quiet
def test_gradients_of_the_exact_inverse_are_numerical(case):
    """Of samples and their log-determinant, in noise, context and every parameter."""
    bijection, x = case.build(), case.data(2)
    for part in bijection.modules():
        if isinstance(part, snf_ext.SelfNormLinear):
            part.fit_inverse()
    z = transform_of(case, bijection.eval(), x)(x).detach().requires_grad_()
    context = case.context(x)
    given = [] if context is None else [context.requires_grad_()]
    torch.manual_seed(1)
    a, b = torch.randn_like(x), torch.randn(2).double()
    if isinstance(bijection, snf_ext.SelfNormConv2d):
        b = 0 * b  # the learned inverse's gradient is not exact

    def value():
        back, log_det = exact_inverse([bijection], z, context)
        return (a * back).sum() + (b * log_det).sum()

    parameters = dict(bijection.named_parameters())
    leaves = [z, *given, *parameters.values()]
    names = ["z", *["context" for _ in given], *parameters]
    got = torch.autograd.grad(value(), leaves, allow_unused=True)
    for name, leaf, gradient in zip(names, leaves, got, strict=True):
        if name == "weight_inv" or name.startswith("g.") or (case.surrogate and name == "weight"):
            continue  # gradients of another objective
        numerical, direction = directional(value, leaf)
        share = 0.5 if case.learned and name == "weight" else 1.0
        ours = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert ours == pytest.approx(share * numerical, rel=2e-6, abs=2e-7), name


def directional(value, leaf, step=1e-5):
    """Derivative of ``value()`` along a random direction of ``leaf``, by central differences."""
    direction, kept = torch.randn_like(leaf), leaf.detach().clone()
    ends = []
    for sign in (1, -1):
        leaf.data.copy_(kept + sign * step * direction)
        with torch.no_grad():
            ends.append(value().item())
    leaf.data.copy_(kept)
    return (ends[0] - ends[1]) / (2 * step), direction


def test_a_tracked_inverse_gets_the_whole_gradient():
    """Of reverse KL's integrand, against a dense solve and slogdet."""
    layer = snf_ext.SelfNormLinear(5, inverse="tracked").double()
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(5, 5))
        layer.weight_inv.zero_()  # to be fitted by who takes gradients
    z = torch.randn(7, 5).double()
    x, log_det = BijectionTransform(layer, (5,)).inv_and_ladj(z)
    ((x - 1).square().sum() + log_det.sum()).backward()
    weight = layer.weight.detach().clone().requires_grad_()
    dense = torch.linalg.solve(weight, (z - layer.bias.detach()).T).T
    loss = (dense - 1).square().sum() + 7 * torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(layer.weight.grad, torch.autograd.grad(loss, weight)[0])
    assert layer.weight_inv.grad is None


def test_half_of_a_penalised_layers_gradient_is_the_learned_inverses():
    """As in ``Flow.loss``: x = R (z - c) sends the other half to R."""
    layer = snf_ext.SelfNormLinear(4).double()
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(4, 4))
    layer.fit_inverse()
    z, a = torch.randn(2, 6, 4).double()
    (BijectionTransform(layer, (4,)).inv(z) * a).sum().backward()
    torch.testing.assert_close(layer.weight_inv.grad, 0.5 * a.T @ (z - layer.bias.detach()))


def test_the_learned_inverse():
    layer = snf_ext.SelfNormLinear(4).double()
    z = torch.randn(6, 4).double()
    transform = BijectionTransform(layer, (4,), exact=False)
    x, log_det = transform.inv_and_ladj(z)
    torch.testing.assert_close(x, (z - layer.bias) @ layer.weight_inv.T)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(layer.weight).logabsdet.expand(6))
    torch.testing.assert_close(transform.inv(z), x)


def test_several_bijections_and_a_context_for_each_sample():
    coupling = snf_ext.AffineCoupling(4, 8, mask="vector", context_features=2)
    parts = [snf_ext.ExactLinear(4), coupling]
    for p in coupling.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, context = torch.randn(3, 5, 4), torch.randn(5, 2)
    z, log_det = BijectionTransform(parts, (4,), context).call_and_ladj(x)
    for i in range(3):
        middle = parts[0](x[i])
        end = coupling(middle.z, context)
        torch.testing.assert_close(z[i], end.z)
        torch.testing.assert_close(log_det[i], middle.log_det + end.log_det)
    one = BijectionTransform(parts, (4,), context[0])
    assert one(x).shape == (3, 5, 4)
    assert one.inv(x).shape == (3, 5, 4)


@pytest.mark.parametrize("forwards", [True, False])
def test_the_cache_keeps_inverse_and_log_det(forwards):
    calls = []

    class Counted(snf_ext.ExactLinear):
        def forward(self, x, context=None):
            calls.append("forward")
            return super().forward(x, context)

        def inverse(self, z, context=None, exact=False):
            calls.append("inverse")
            return super().inverse(z, context, exact)

    transform = BijectionTransform(Counted(3), (3,), cache_size=1)
    base = Independent(Normal(torch.zeros(3), 1.0), 1)
    density = TransformedDistribution(base, transform if forwards else transform.inv)
    x = density.rsample((5,))
    made_by = ["forward"] if forwards else ["inverse", "forward"]
    assert calls == made_by
    kept = density.log_prob(x)
    assert calls == made_by
    torch.testing.assert_close(kept, density.log_prob(x.detach().clone()))
    assert len(calls) > len(made_by)
    again = transform.with_cache(0)
    assert again.with_cache(0) is again
    assert again.with_cache(1)._cache_size == 1


def test_shapes_and_domains():
    transform = BijectionTransform(snf_ext.Flatten((2, 3)), (2, 3))
    assert transform.bijective
    assert transform.forward_shape((7, 2, 3)) == (7, 6)
    assert transform.inverse_shape((7, 6)) == (7, 2, 3)
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (2, 1)
    assert transform.inv.inv is transform
    logit = BijectionTransform([snf_ext.Normalize(0.0, 8.0), snf_ext.Logit(0.05)], (2,))
    inner = logit.domain.base_constraint
    assert inner.lower_bound == pytest.approx(-8 * 0.05 / 0.9)
    assert inner.upper_bound == pytest.approx(8 + 8 * 0.05 / 0.9)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 2\]; got \[4, 3\]"):
        logit(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"z must have shape \[..., 2\]; got \[4, 3\]"):
        logit.inv(torch.zeros(4, 3))
    assert repr(transform) == "BijectionTransform(Flatten, event_shape=(2, 3), exact=True)"


@every_noisy
def test_what_draws_noise_is_no_transform(case):
    with pytest.raises(NotImplementedError, match=r"bijection must be a function .* draws noise"):
        BijectionTransform(case.make(), case.event_shape)


def test_expand_a_transformed_distribution():
    coupling = snf_ext.AffineCoupling(4, 8, mask="vector", context_features=2)
    for p in coupling.parameters():
        p.data += 0.1 * torch.randn_like(p)
    transform = BijectionTransform(coupling, (4,), torch.randn(5, 2))
    base = Independent(Normal(torch.zeros(4), 1.0), 1)
    density = TransformedDistribution(base, transform.inv)
    assert density.batch_shape == (5,)
    wider = density.expand((3, 5))
    x = wider.sample((2,))
    assert x.shape == (2, 3, 5, 4)
    torch.testing.assert_close(wider.log_prob(x), density.log_prob(x))


def test_second_derivatives_and_function_transforms_are_refused():
    layer = snf_ext.ExactLinear(3)
    x = BijectionTransform(layer, (3,)).inv(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda z: BijectionTransform(layer, (3,)).inv(z).sum())(torch.randn(2, 3))
    (gradient,) = torch.autograd.grad(x.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Flows


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
