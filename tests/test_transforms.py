"""Bijections as transforms of torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from bijections_table import BIJECTIONS
from numerical import directional
from torch.distributions import (
    Independent,
    Normal,
    TransformedDistribution,
    Uniform,
)

import snf_ext
from snf_ext import BijectionTransform
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
