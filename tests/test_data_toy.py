"""Densities in the plane: their closed forms, and points that no run's seed changes."""

import math

import pytest
import torch

from snf_ext import models
from snf_ext.training import data, toy
from snf_ext.training.errors import UserError


@pytest.mark.parametrize("name", toy.DENSITIES)
def test_points_are_the_same_in_every_run(name):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(data.load(name))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = states
    assert (first.name, first.event_shape, first.pixel_levels) == (name, (2,), None)
    assert [len(s) for s in (first.train, first.val, first.test)] == [10_000, 2_000, 10_000]
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.test, second.test)
    together = torch.cat([first.train, first.val, first.test])
    assert len(together.unique(dim=0)) == len(together)  # no point is in two splits
    assert together.mean(0).abs().max() < 0.05
    assert together.std(0).min() > 0.7
    assert together.std(0).max() < 1.3


def test_points_lie_where_the_densities_are():
    board = toy.load_toy("checkerboard").train
    field = board.floor().long() + 2
    assert field.min() == 0
    assert field.max() == 3
    assert bool((field.sum(1) % 2 == 0).all())
    counts = torch.bincount(4 * field[:, 0] + field[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8
    assert counts[counts > 0].min() > 1250 - 5 * math.sqrt(1250)
    radius = toy.load_toy("rings").train.norm(dim=1)
    nearest = (radius / 0.6).round().clamp(1, 3) * 0.6
    assert (radius - nearest).std().item() == pytest.approx(0.08, rel=0.05)
    moons = toy.load_toy("moons").train / torch.tensor([1.15, 2.0]) + torch.tensor([0.5, 0.25])
    upper, lower = moons.norm(dim=1), (moons - torch.tensor([1.0, 0.5])).norm(dim=1)
    off = torch.where((upper - 1).abs() < (lower - 1).abs(), upper, lower) - 1
    assert off.abs().max() < 0.5
    assert off.std().item() == pytest.approx(0.1, rel=0.1)


def test_points_have_no_classes():
    with pytest.raises(UserError, match="rings has no classes; leave out --conditional"):
        data.load("rings", labels=True)


@pytest.mark.parametrize("model", ["fc", "autoregressive"])
def test_models_take_continuous_data_as_it_is(model):
    """Nothing is done before the first layer, and the likelihood is a density."""
    make = getattr(models, model)
    torch.manual_seed(0)
    flow = make((2,), pixel_levels=None).double().eval()
    pixels = make((2,), pixel_levels=4)
    assert len(flow.bijections) == len(pixels.bijections) - {"fc": 3, "autoregressive": 4}[model]
    assert type(flow.bijections[0]).__name__ == "Flatten"
    x = torch.randn(5, 2, dtype=torch.float64)
    z = flow(x).z
    jacobian = torch.autograd.functional.jacobian(lambda y: flow(y).z.sum(0), x).transpose(0, 1)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    want = base + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.log_prob(x), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.inverse(z, exact=True), x, rtol=1e-6, atol=1e-6)
