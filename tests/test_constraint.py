"""Controllers: they hold their constraint, their state is whole, and recon is weighted by them."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import snf_ext
from snf_ext.constraint import controllers
from snf_ext.controllers import CONTROLLERS

pytestmark = pytest.mark.usefixtures("one_thread")

# Quick ones, for systems that answer at once.
QUICK = {
    "relative": {"gain": 0.1},
    "geco": {"rate": 0.05},
    "augmented-lagrangian": {"penalty": 4.0, "period": 10},
    "differential-multipliers": {"rate": 0.5},
}
AIM = {"relative": 0.7}  # shares of kappa that are steered to, 1 if not here
kinds = pytest.mark.parametrize("kind", list(CONTROLLERS))


def make(kind, **settings):
    return CONTROLLERS[kind](**QUICK[kind] | {"kappa": 0.1} | settings)


def show(controller, error, steps=1):
    """Batches of that relative error."""
    for _ in range(steps):
        controller(torch.full((3,), 20 * error), torch.full((3, 5), 2.0))
    return controller.recon_weight.item()


def test_all_kinds_are_driven():
    assert set(QUICK) == set(CONTROLLERS)


# ---- what they do


@kinds
@pytest.mark.parametrize("start", [0.02, 40.0])
def test_settles_where_a_known_system_meets_the_constraint(kind, start):
    """error(lambda) = 1 / (1 + lambda) is e at lambda = 1 / e - 1."""
    controller = make(kind, recon_weight=start)
    for _ in range(500):
        weight = show(controller, 1 / (1 + controller.recon_weight.item()))
    error = 0.1 * AIM.get(kind, 1.0)
    assert weight == pytest.approx(1 / error - 1, rel=1e-3)
    assert controller.error.item() == pytest.approx(error, rel=1e-3)


def test_default_settles_where_the_error_lags_and_is_noisy():
    """A learned inverse answers late: here with a time constant of 50 steps, over powers of ten."""
    controller, log_error = snf_ext.Relative(1e-2, 0.01), math.log(10.0)
    seen = []
    for noise in 0.1 * torch.randn(1500):
        log_error += (math.log(0.1) - math.log(controller.recon_weight.item()) - log_error) / 50
        show(controller, math.exp(log_error + noise.item()))
        seen.append(log_error)
    settled = AIM["relative"] * 1e-2
    assert all(abs(value - math.log(settled)) < math.log(1.5) for value in seen[-500:])
    assert controller.recon_weight.item() == pytest.approx(0.1 / settled, rel=0.3)


@kinds
def test_rises_where_violated_and_falls_where_satisfied(kind):
    controller = make(kind, recon_weight=5.0, ema=0.0)
    for error, sign in ((0.3, 1), (0.01, -1), (0.3, 1)):
        before = controller.recon_weight.item()
        assert sign * (show(controller, error) - before) > 0


def test_one_step_of_each_by_hand():
    by_hand = {
        "relative": 5 * (3 / AIM["relative"]) ** (0.1 + 2.0),
        "geco": 5 * math.exp(0.05 * 2),
        "augmented-lagrangian": 5 + 4 * 2,
        "differential-multipliers": 5 + 0.5 * 2 + 1.0 * 2,
    }
    for kind, weight in by_hand.items():
        assert show(make(kind, recon_weight=5.0), 0.3) == pytest.approx(weight, rel=1e-6)
    assert show(snf_ext.Fixed(5.0), 0.3) == 5


def test_augmented_lagrangian_updates_once_a_period():
    controller = make("augmented-lagrangian", recon_weight=5.0, penalty=1.0, period=3, ema=0.0)
    shown = [show(controller, 0.3) for _ in range(7)]
    # rho stays 1 at step 3, as 2 is under a quarter of 10, and grows at 6, where 2 is no less.
    assert shown == pytest.approx([7.0] * 3 + [9.0] * 3 + [9 + 1.5 * 2])
    assert controller.multiplier.item() == pytest.approx(9)
    assert controller.penalty.item() == pytest.approx(1.5)
    assert controller.before.item() == pytest.approx(2)


@kinds
def test_bounds_hold_and_are_left_at_once(kind):
    controller = make(kind, bounds=(0.5, 20.0), ema=0.0)
    assert show(controller, 1e9, 400) == 20
    assert show(controller, 1e-9) < 20
    assert show(controller, 0.0, 800) == 0.5
    assert show(controller, 1e9) > 0.5


def test_error_is_a_ratio_of_discounted_sums():
    controller = snf_ext.Fixed(1.0, ema=0.75)
    assert controller.error.isnan()
    above = below = 0.0
    for recon, energy in ((1.0, 10.0), (2.0, 10.0), (9.0, 30.0)):
        controller(torch.tensor([recon]), torch.tensor([[energy**0.5]]))
        above, below = 0.75 * above + recon, 0.75 * below + energy
        assert controller.error.item() == pytest.approx(above / below)


# ---- state


@kinds
def test_goes_on_bit_for_bit_from_saved_state(kind):
    errors = (torch.rand(60).double() * 0.4).tolist()
    whole, first = make(kind), make(kind)
    for error in errors:
        show(whole, error)
    for error in errors[:35]:
        show(first, error)
    second = make(kind, recon_weight=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for error in errors[35:]:
        show(second, error)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not list(whole.parameters())


@kinds
@pytest.mark.parametrize(
    ("recon", "x"),
    [
        (torch.tensor([1.0, math.nan]), torch.ones(2, 5)),
        (torch.tensor([1.0, math.inf]), torch.ones(2, 5)),
        (torch.ones(2), torch.full((2, 5), math.nan)),
        (torch.full((2,), 3e38), torch.ones(2, 5)),
    ],
)
def test_what_is_not_finite_changes_nothing(kind, recon, x):
    controller = make(kind)
    show(controller, 0.3, 5)
    before = copy.deepcopy(controller.state_dict())
    assert controller(recon, x).shape == recon.shape
    for name, value in controller.state_dict().items():
        assert torch.equal(value, before[name]), name


@kinds
def test_nothing_seen_changes_nothing(kind):
    """Neither an empty batch nor zeros have a relative error."""
    controller = make(kind)
    before = copy.deepcopy(controller.state_dict())
    for count in (0, 3):
        assert controller(torch.zeros(count), torch.zeros(count, 5)).tolist() == [0.0] * count
    for name, value in controller.state_dict().items():
        assert torch.equal(value, before[name]), name


@kinds
def test_half_precision_keeps_wide_state(kind):
    controller = make(kind).bfloat16()
    assert {b.dtype for b in controller.buffers()} == {torch.float32} | (
        {torch.int64} if kind == "augmented-lagrangian" else set()
    )
    controller(torch.ones(3), torch.ones(3, 5, dtype=torch.bfloat16))
    assert controller.error.item() == pytest.approx(0.2)
    assert controller.double().error.dtype == torch.float64
    assert controller(torch.ones(3, dtype=torch.float64), torch.ones(3, 5).double()).dtype == (
        torch.float64
    )


@kinds
def test_asks_nothing_of_the_device(kind):
    """On the meta device there are no values to ask for."""
    flow = snf_ext.Flow([snf_ext.SelfNormLinear(4), snf_ext.SelfNormLinear(4)], (4,)).to("meta")
    snf_ext.constrain(flow, make(kind))
    for _ in range(2):
        z, log_det, recon = flow(torch.randn(3, 4, device="meta"))
        (z.square().sum(1) - log_det + recon).mean().backward()
    assert {b.device.type for b in flow.buffers()} == {"meta"}


@kinds
def test_compiled_steps_are_the_same(kind):
    layer = snf_ext.SelfNormLinear(4)
    layer.controller = make(kind)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for x in torch.randn(3, 6, 4):
        for step in (layer(x), compiled(x)):
            (step.z.square().sum(1) - step.log_det + step.recon).mean().backward()
    assert layer.controller.sums[1] > 0
    for (name, ours), theirs in zip(
        layer.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
    torch.testing.assert_close(layer.weight_inv.grad, other.weight_inv.grad)


def test_sums_over_ranks(monkeypatch):
    """The error is that of all samples, however many each rank has."""
    others = torch.tensor([30.0, 100.0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(others))
    controller = make("relative")
    show(controller, 0.1)
    assert controller.error.item() == pytest.approx((6 + 30) / (60 + 100))


RANK = """
import sys
import torch
import torch.distributed as dist
import snf_ext
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
flow = snf_ext.constrain(snf_ext.models.fc((1, 2, 2)), snf_ext.Relative(1e-2))
torch.manual_seed(1 + rank)
for step in range(5):
    flow.loss(torch.randint(256, (3 + rank, 1, 2, 2))).backward()
held = {k: v for k, v in flow.state_dict().items() if "controller" in k}
torch.save((held, flow.bijections[4].weight_inv.grad), f"{out}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.slow
def test_ranks_agree(tmp_path):
    root = Path(snf_ext.__file__).parents[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(tmp_path)],
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    (first, grad), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 6
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["bijections.6.controller.recon_weight"] != 1
    assert not torch.equal(grad, other)  # of other samples


# ---- in layers and flows

LAYERS = {
    "linear": (lambda: snf_ext.SelfNormLinear(4), (5, 4)),
    "linear, extra dimensions": (lambda: snf_ext.SelfNormLinear(4), (5, 2, 3, 4)),
    "convolution": (lambda: snf_ext.SelfNormConv2d(2, 3), (5, 2, 4, 4)),
    "networks": (
        lambda: snf_ext.SelfNormBijection(nn.Linear(4, 4), nn.Linear(4, 4), (4,), probes=4),
        (5, 4),
    ),
}
layers = pytest.mark.parametrize(("make_layer", "shape"), LAYERS.values(), ids=LAYERS.keys())


@layers
def test_recon_and_its_gradient_are_weighted(make_layer, shape, backend):
    layer, x = make_layer(), torch.randn(shape)
    gradients = []
    for weight in (1.0, 3.0):
        layer.zero_grad()
        layer.controller = snf_ext.Fixed(weight) if weight != 1 else None
        step = layer(x)
        matrices = [p for p in layer.parameters() if p.dim() > 1]
        found = torch.autograd.grad(step.recon.sum(), matrices)
        gradients.append([step.recon.detach(), *found])
    for once, thrice in zip(*gradients, strict=True):
        torch.testing.assert_close(3 * once, thrice)
        assert once.abs().max() > 0
    recon, energy = gradients[0][0].sum(), x.square().sum()
    assert layer.controller.error.item() == pytest.approx((recon / energy).item(), rel=1e-5)


@layers
def test_evaluation_is_raw_and_leaves_the_state(make_layer, shape):
    layer, x = make_layer(), torch.randn(shape)
    expected = layer.eval()(x)
    layer.controller = make("relative", recon_weight=3.0).train(False)
    for step in (layer(x), layer.train().exact_forward(x), layer.eval()(x)):
        torch.testing.assert_close(step, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x).recon, 3 * expected.recon)
    assert layer.controller.sums.tolist() == [0, 0]


def test_two_forward_passes_before_backward():
    """As when gradients are accumulated: each has the lambda that it met."""
    layer, xs = snf_ext.SelfNormLinear(4), torch.randn(2, 6, 4)
    layer.controller = make("relative", kappa=1e-6)
    met, total = [], 0.0
    for x in xs:
        total = total + layer(x).recon.sum()
        met.append(layer.controller.recon_weight.item())
    found = torch.autograd.grad(total, layer.weight_inv)[0]
    layer.controller = None
    by_hand = sum(w * layer(x).recon.sum() for w, x in zip(met, xs, strict=True))
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, layer.weight_inv)[0])
    assert met[1] > met[0] > 1


def test_the_loss_has_a_lambda_for_each_layer():
    flow = snf_ext.Flow([snf_ext.SelfNormLinear(3) for _ in range(2)], (3,), recon_weight=77.0)
    first, second = flow.bijections
    x = torch.randn(5, 3)
    with torch.no_grad():
        a = first(x)
        b = second(a.z)
        nll = -torch.distributions.Normal(0.0, 1.0).log_prob(b.z).sum(1)
        by_hand = (nll + 2 * a.recon + 5 * b.recon).mean()
    assert snf_ext.constrain(flow, snf_ext.Relative()) is flow
    assert flow.recon_weight == 1
    first.controller, second.controller = snf_ext.Fixed(2.0), snf_ext.Fixed(5.0)
    torch.testing.assert_close(flow.loss(x), by_hand)


def test_constrain_finds_layers_at_any_depth_and_gives_each_its_own():
    flow = snf_ext.models.glow((1, 8, 8), levels=2, steps=2, width=4).eval()
    given = snf_ext.Relative(kappa=0.5)
    held = controllers(snf_ext.constrain(flow, given))
    learned = [n for n, m in flow.named_modules() if isinstance(m, snf_ext.SelfNormConv2d)]
    assert list(held) == learned
    assert len({id(c) for c in (*held.values(), given)}) == 5
    assert not any(c.training for c in held.values())
    flow.train().loss(torch.randint(256, (4, 1, 8, 8))).backward()
    assert len({c.error.item() for c in held.values()}) == 4
    snf_ext.constrain(flow, snf_ext.Fixed(3.0))
    assert {type(c) for c in controllers(flow).values()} == {snf_ext.Fixed}


def test_measuring_the_angle_leaves_the_state():
    flow = snf_ext.constrain(snf_ext.models.fc((1, 2, 2)), snf_ext.Relative())
    angles = snf_ext.gradient_angle(flow, torch.randint(256, (4, 1, 2, 2)))
    assert list(angles) == list(controllers(flow))
    assert all(c.error.isnan() for c in controllers(flow).values())


@pytest.mark.parametrize("start", [0.01, 1e2])
def test_a_controlled_flow_is_held_to_its_constraint(start):
    """From a lambda that is too small, and one that is too large; the last 100 of 400 steps."""
    mix = torch.randn(6, 6)
    first, second = (snf_ext.SelfNormLinear(6) for _ in range(2))
    flow = snf_ext.Flow([first, snf_ext.SmoothLeakyReLU(0.3), second], (6,))
    snf_ext.constrain(flow, snf_ext.Relative(1e-3, start))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(400):
        optimizer.zero_grad()
        flow.loss(torch.randn(32, 6) @ mix).backward()
        optimizer.step()
        if step >= 300:
            assert all(held.error.item() < 2e-3 for held in controllers(flow).values())
    for held in controllers(flow).values():
        assert 0.02 < held.recon_weight.item() < 50


# ---- what does not fit


@kinds
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 0.0}, "kappa must be positive and finite; got 0.0"),
        ({"kappa": math.nan}, "kappa must be positive and finite; got nan"),
        ({"recon_weight": -1.0}, r"recon_weight must lie in the bounds \(.*\); got -1.0"),
        ({"recon_weight": 9.0, "bounds": (1.0, 5.0)}, r"recon_weight must lie .*5.0\); got 9.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\); got 1.0"),
        ({"bounds": (0.0, 1.0)}, r"bounds must be positive, finite and in order; got \(0.0, 1.0\)"),
        ({"bounds": (3.0, 1.0)}, r"bounds must be positive, finite and in order; got \(3.0, 1.0\)"),
    ],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("relative", {"gain": 0.0}, "gain must be positive and finite; got 0.0"),
        ("relative", {"damping": 0.0}, "damping must be positive and finite; got 0.0"),
        (
            "relative",
            {"limits": (0.1, 2.0)},
            r"limits must be .*; got \(0.1, 2.0\)",
        ),
        ("relative", {"limits": (-1.0, math.inf)}, r"limits must be .*; got \(-1.0, inf\)"),
        ("geco", {"rate": -1.0}, "rate must be positive and finite; got -1.0"),
        ("differential-multipliers", {"rate": 0.0}, "rate must be positive and finite; got 0.0"),
        ("differential-multipliers", {"damping": 0.0}, "damping must be positive and finite; got"),
        ("augmented-lagrangian", {"penalty": 0.0}, "penalty must be positive and finite; got 0.0"),
        ("augmented-lagrangian", {"growth": 0.5}, "growth must be at least 1 and finite; got 0.5"),
        ("augmented-lagrangian", {"period": 0}, "period must be an int of at least 1; got 0"),
        ("augmented-lagrangian", {"period": 2.0}, "period must be an int of at least 1; got 2.0"),
    ],
)
def test_bad_settings_of_a_kind(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **settings)


def test_bad_controllers_and_flows():
    with pytest.raises(ValueError, match="recon_weight must be positive and finite; got 0"):
        snf_ext.Fixed(0)
    with pytest.raises(TypeError, match="controller must be a Controller; got float"):
        snf_ext.constrain(snf_ext.models.fc((1, 2, 2)), 1.0)
    exact = snf_ext.models.fc((1, 2, 2), linear="exact")
    with pytest.raises(ValueError, match="flow must have a layer whose inverse is trained by"):
        snf_ext.constrain(snf_ext.models.fc((1, 2, 2), inverse="tracked"), snf_ext.Relative())
    with pytest.raises(ValueError, match="flow must have a layer whose inverse is trained by"):
        snf_ext.constrain(exact, snf_ext.Relative())
    with pytest.raises(NotImplementedError, match="Controller has no _next"):
        snf_ext.Controller()(torch.ones(1), torch.ones(1, 2))
