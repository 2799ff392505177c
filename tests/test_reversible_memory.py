"""Reversible training: what is kept instead of activations, and how it is checked."""

from __future__ import annotations

import math

import pytest
import torch
from bijections_table import BIJECTIONS
from reversible_twins import MODELS, Watched, assert_same, gradients, images, loss, twins
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import snf_ext
from snf_ext import NotReversible, Reversible

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- noise and state


class Counting(snf_ext.Bijection):
    """Has dropout and batch norm in a coupling's network, as users do."""

    def __init__(self):
        super().__init__()
        net = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Dropout(0.3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        self.coupling = snf_ext.AffineCoupling(4, net=net)

    def forward(self, x, context=None):
        return self.coupling(x, context)

    def inverse(self, z, context=None, exact=False):
        return self.coupling.inverse(z, context, exact)


def test_noise_and_buffers_of_any_network():
    flow, reversible = twins(
        snf_ext.Flow([snf_ext.ActNorm(4), Counting(), snf_ext.SelfNormConv2d(4, 3)], (4, 6, 6))
    )
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    assert_same(flow, reversible, loss, x)
    assert flow.bijections[1].coupling.net[1].num_batches_tracked == 1
    after = []
    for f in (flow, reversible):  # the same random numbers are drawn next
        gradients(f, loss, x)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def test_state_changes_once():
    def make():
        return snf_ext.Flow(
            [
                snf_ext.ActNorm(4, init_batches=3),
                snf_ext.SelfNormConv2d(4, 3, inverse=snf_ext.Tracked(every=2)),
                snf_ext.BatchNorm(4),
                snf_ext.SelfNormConv2d(4, 1),
                snf_ext.Flatten((4, 4, 4)),
                snf_ext.SelfNormLinear(64, inverse=snf_ext.Tracked(every=3, samples=4)),
            ],
            (4, 4, 4),
        )

    flow, reversible = twins(snf_ext.constrain(make(), snf_ext.Relative()))
    for _ in range(5):
        x = 2 * torch.randn(8, 4, 4, 4, dtype=torch.float64) + 1
        assert_same(flow, reversible, loss, x)
        with torch.no_grad():
            for f in (flow, reversible):
                for p in f.parameters():
                    p += 0.01 * p
        for a, b in zip(flow.parameters(), reversible.parameters(), strict=True):
            b.data.copy_(a.data)
    assert flow.bijections[0]._left == reversible.bijections[0]._left == 0


@pytest.mark.parametrize(
    "controller", [snf_ext.Relative, snf_ext.GECO, snf_ext.AugmentedLagrangian]
)
def test_controllers_weigh_each_graph_as_then(controller):
    flow, reversible = twins(snf_ext.constrain(MODELS["conv"](), controller(1e-6)))
    batches = [images(flow)[0] for _ in range(3)]
    assert_same(flow, reversible, lambda f, *xs: sum(f.loss(x) for x in xs), *batches)
    weights = [c.recon_weight.item() for c in snf_ext.constraint.controllers(flow).values()]
    assert all(w != 1 for w in weights)


def test_a_measured_step_sees_the_same_angles():
    flow, reversible = twins(MODELS["conv"]())
    (x,) = images(flow)
    angles = []
    for f in (flow, reversible):
        monitor, guard = snf_ext.GradientMonitor(f, 1), snf_ext.DivergenceGuard(f, 1)
        torch.manual_seed(3)
        with monitor.step(), guard.step():
            value = f.loss(x)
            value.backward()
        guard.check(value, x)
        angles.append(monitor.angles)
    assert angles[0] == pytest.approx(angles[1], rel=1e-6)
    assert len(angles[0]) == 6


@pytest.mark.parametrize("name", ["conv", "glow", "fc-debiased"])
def test_any_device(device, name):
    flow, reversible = twins(MODELS[name]().to(device), torch.float32)
    assert_same(flow, reversible, loss, images(flow, dtype=torch.float32)[0].to(device))


@pytest.mark.parametrize("make", [lambda: snf_ext.SelfNormLinear(6), lambda: BIJECTIONS[4].make()])
def test_refining_without_looking_takes_all_steps(make):
    layer = make().double()
    x = torch.randn(5, *((6,) if isinstance(layer, snf_ext.SelfNormLinear) else (4,))).double()
    z = layer(x).z.detach()
    blind, seeing = layer._refined(z, 40, wait=False), layer._refined(z, 40)
    assert seeing.steps < blind.steps == 40
    torch.testing.assert_close(blind.x, seeing.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blind.x, x, rtol=1e-9, atol=1e-9)


# ---- what is kept


@pytest.mark.parametrize("layers", [2, 6])
def test_one_activation_is_kept_whatever_the_depth(layers):
    bijections = []
    for _ in range(layers):
        bijections += [snf_ext.RationalQuadraticSpline((32,)), snf_ext.SelfNormLinear(32)]
    flow = snf_ext.Flow(bijections, (32,))
    x, seen = torch.randn(50, 32), []

    def see(layer, args, step):
        seen.extend(StorageWeakRef(t.untyped_storage()) for t in (args[0], step.z))

    for bijection in bijections:
        bijection.register_forward_hook(see)

    def alive():
        seen.clear()
        value = flow.loss(x)
        assert value.requires_grad
        return len({ref.cdata for ref in seen if not ref.expired()})

    assert alive() > layers  # all, or those that the backend's operators need
    flow.reversible = Reversible()
    assert alive() == 2  # x is the caller's


def test_activations_are_freed():
    watched = [Watched() for _ in range(4)]
    flow = snf_ext.Flow(watched, (6,))
    flow.reversible = Reversible()
    value = flow.loss(torch.randn(3, 6))
    assert all(w.inputs[0].expired() for w in watched[1:])
    value.backward()
    assert [len(w.inputs) for w in watched] == [2] * 4
    flow.reversible = None
    kept_alive = flow.loss(torch.randn(3, 6))
    assert not any(w.inputs[2].expired() for w in watched)
    assert kept_alive.requires_grad


def test_undoes_false_keeps_the_input():
    flow, reversible = twins(MODELS["fc"]())
    layer = reversible.bijections[4]
    layer.undoes = False
    with torch.no_grad():
        for f in (flow, reversible):
            f.bijections[4].weight_inv.zero_()
    assert_same(flow, reversible, loss, *images(flow))
    layer.undoes = True
    with pytest.raises(NotReversible, match=r"the input of bijections\.4 \(SelfNormLinear\)"):
        gradients(reversible, loss, *images(flow))


# ---- the check


def test_a_poor_inverse_is_refused_and_named():
    flow, reversible = twins(MODELS["fc"](), torch.float32)
    with torch.no_grad():
        reversible.bijections[6].weight_inv.mul_(0.2)  # converges, slowly
    for p in reversible.parameters():
        p.grad = None
    (x,) = images(flow, dtype=torch.float32)
    with pytest.raises(NotReversible, match=r"over the limit of 0\.0001") as caught:
        reversible.loss(x).backward()
    assert caught.value.layer == "bijections.6"
    assert 1e-3 < caught.value.error < 1
    assert all(p.grad is None for p in reversible.parameters())
    reversible.reversible = Reversible(refine=100)
    reversible.loss(x).backward()
    reversible.reversible = Reversible(exact=True)
    reversible.loss(x).backward()
    reversible.reversible = Reversible(limit=1.0)
    reversible.loss(x).backward()


def test_an_error_that_the_output_does_not_show_is_seen():
    """Pushed forward again, what is rebuilt agrees to rounding; it is not what it was."""
    layer = snf_ext.ExactLinear(6)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-6])))
    flow = snf_ext.Flow([layer], (6,))
    flow.reversible = Reversible()
    with torch.no_grad():
        layer.bias.fill_(1.0)
    x = torch.randn(20, 6)
    z = layer(x).z
    rebuilt = layer.undo(z)
    again = layer(rebuilt).z
    assert ((again - z).norm(dim=1) / z.norm(dim=1)).max() < 1e-6
    assert ((rebuilt - x).norm(dim=1) / x.norm(dim=1)).max() > 1e-3
    with pytest.raises(NotReversible, match=r"bijections\.0 \(ExactLinear\)"):
        flow.loss(x).backward()


def test_errors_that_add_up_are_seen():
    """Each layer's own error is within the limit; ten of them are not."""
    flow = snf_ext.Flow([Watched() for _ in range(10)], (600,))
    flow.reversible = Reversible(limit=4e-3)
    for w in flow.bijections:
        w.undo = lambda z, *args, w=w: 1.001 * z / w.scale
    value = flow.loss(torch.randn(20, 600))
    with pytest.raises(NotReversible) as caught:
        value.backward()
    assert caught.value.layer in {f"bijections.{i}" for i in range(1, 9)}
    assert 4e-3 < caught.value.error < 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite_do_as_in_the_ordinary_mode(bad):
    flow, reversible = twins(MODELS["conv"]())
    latent = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    latent[1, 0, 2, 2] = bad
    chain = [snf_ext.Flow(list(f.bijections)[3:], (1, 8, 8)) for f in (flow, reversible)]
    chain[1].reversible = Reversible()
    for f in chain:
        f(latent).z.sum().backward()
    weights = [f.bijections[0].weight.grad for f in chain]
    assert not weights[0].isfinite().all()
    assert not weights[1].isfinite().all()


def test_an_inverse_that_gives_nan_is_refused():
    flow = snf_ext.Flow([Watched()], (6,))
    flow.reversible = Reversible()
    flow.bijections[0].undo = lambda z, *args: z * math.nan
    with pytest.raises(NotReversible, match="relative error of inf"):
        flow.loss(torch.randn(3, 6)).backward()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"refine": -1}, "refine must be an int of at least 0; got -1"),
        ({"limit": 0.0}, "limit must be positive and finite; got 0.0"),
        ({"limit": math.inf}, "limit must be positive and finite; got inf"),
    ],
)
def test_settings_are_checked(how, message):
    with pytest.raises(ValueError, match=message):
        Reversible(**how)
