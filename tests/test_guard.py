"""The divergence guard: what it finds, what it says, and that nothing else changes."""

import math
from dataclasses import replace

import ground_truth
import pytest
import small_flows
import torch
from small_flows import Nest
from torch import nn
from training_runs import CONFIG, DATA, new_run, same_run

import snf_ext
from snf_ext.training import checkpoint, evaluate
from snf_ext.training.guard import DivergenceGuard, first_not_finite, norm_of_error

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = 5
CHECKED = replace(CONFIG, check_every=EVERY)


def networks(features):
    f, g = nn.Linear(features, features, bias=False), nn.Linear(features, features, bias=False)
    nn.init.orthogonal_(f.weight)
    with torch.no_grad():
        g.weight.copy_(f.weight.T)
    return f, g


def nested(layer):
    """The layer inside another, after one that has no inverse to learn."""
    shape = (2, 4, 4) if isinstance(layer, snf_ext.SelfNormConv2d) else (36,)
    return snf_ext.Flow([snf_ext.SmoothLeakyReLU(0.5), Nest([layer])], shape)


# By type: the layer, W as a dense matrix, R as one, and how to multiply R.
def linear():
    layer = snf_ext.SelfNormLinear(36)
    return layer, lambda: layer.weight, lambda: layer.weight_inv, layer.weight_inv


def conv():
    layer = snf_ext.SelfNormConv2d(2, 3)

    def dense(weight):
        return torch.from_numpy(ground_truth.conv_matrix(weight.detach(), (4, 4))).float()

    return layer, lambda: dense(layer.weight), lambda: dense(layer.weight_inv), layer.weight_inv


def general():
    f, g = networks(36)
    layer = snf_ext.SelfNormBijection(f, g, (36,), jvp_weight=100.0)
    return layer, lambda: f.weight, lambda: g.weight, g.weight


LAYERS = {make.__name__: make for make in (linear, conv, general)}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def train(flow, guard, steps, before=lambda step: None):
    """A loop of one's own."""
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        before(step)
        x = torch.randn(16, *flow.event_shape, generator=generator)
        optimizer.zero_grad()
        with guard.step():
            loss = flow.loss(x)
            loss.backward()
        guard.check(loss, x)
        optimizer.step()


# ---- what is measured


@every_layer
def test_the_relative_error_of_the_first_step(make):
    layer, weight, inverse, scaled = make()
    with torch.no_grad():
        scaled.mul_(-3)
    flow = nested(layer)
    x = torch.randn(16, *flow.event_shape)
    guard = DivergenceGuard(flow)
    with guard.step():
        loss = flow.loss(x)
    guard.check(loss.item(), x)
    u = snf_ext.SmoothLeakyReLU(0.5)(x).z.flatten(1)
    error = u - u @ weight().T @ inverse().T
    relative = (error.square().sum() / u.square().sum()).item()
    assert guard.start == {"bijections.1.rest.0": pytest.approx(relative, rel=1e-4)}
    assert relative > 4


@every_layer
def test_the_norm_is_that_of_the_matrix(make):
    layer, weight, inverse, scaled = make()
    with torch.no_grad():
        scaled.mul_(-20).add_(torch.randn_like(scaled))
    x = torch.randn(5, *nested(layer).event_shape)
    matrix = torch.eye(weight().shape[0]) - inverse() @ weight()
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    assert 0.8 * norm < norm_of_error(layer, x) < norm * (1 + 1e-5)
    assert norm_of_error(layer, x) == norm_of_error(layer, x)


def test_a_norm_that_stands_out_is_found_exactly():
    layer = snf_ext.SelfNormLinear(784)
    u = nn.functional.normalize(torch.randn(784), dim=0)
    with torch.no_grad():
        layer.weight_inv.copy_(torch.linalg.inv(layer.weight)).add_(30 * torch.outer(u, u))
    matrix = torch.eye(784) - (layer.weight_inv @ layer.weight).detach()
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    assert norm_of_error(layer, torch.randn(1, 784)) == pytest.approx(norm, rel=1e-3)


# ---- a loop of one's own


@every_layer
def test_an_exploding_reconstruction(make):
    layer, _, _, scaled = make()

    def before(step):
        if step == 8:
            scaled.data.mul_(50)

    flow = nested(layer)
    guard = DivergenceGuard(flow, EVERY)
    message = (
        r"training diverged: the relative reconstruction error of bijections.1.rest.0 "
        rf"\({type(layer).__name__}\) is .*, over the limit of 10, in step 10; the learned inverse"
    )
    with pytest.raises(snf_ext.Diverged, match=message):
        train(flow, guard, 20, before)


@every_layer
@pytest.mark.parametrize("asked", [True, False])
def test_a_useless_inverse(make, asked):
    """Norm 2.5: too much for the samples asked for, if not for training."""
    layer, _, _, scaled = make()

    def before(step):
        if step == 8:
            scaled.data.mul_(-1.5)

    flow = nested(layer)
    guard = DivergenceGuard(flow, EVERY, asked, inverse_limit=2.0)
    if not asked:
        train(flow, guard, 10, before)
        return
    message = (
        r"training diverged: \|\|I - R W\|\| of bijections.1.rest.0 "
        rf"\({type(layer).__name__}\) is .*, over the limit of 2, in step 10; .*exact=True"
    )
    with pytest.raises(snf_ext.Diverged, match=message):
        train(flow, guard, 20, before)


def test_a_layer_that_starts_badly_may_learn():
    layer, _, _, scaled = general()
    scaled.data.mul_(-8)
    flow = nested(layer)
    guard = DivergenceGuard(flow, EVERY)
    train(flow, guard, 10)
    assert guard.start == {"bijections.1.rest.0": pytest.approx(81, rel=0.01)}
    guard.start = {}  # as if it had come to this
    with pytest.raises(snf_ext.Diverged, match=r"reconstruction error of bijections.1.rest.0"):
        train(flow, guard, 5)


def test_no_random_number_is_drawn_and_no_hook_stays():
    flow = nested(snf_ext.SelfNormLinear(36))
    guard = DivergenceGuard(flow, 1, check_inverse=True)
    x = torch.randn(4, 36)
    before = torch.get_rng_state()
    with guard.step():
        loss = flow.loss(x)
        loss.backward()
    guard.check(loss, x)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module._forward_hooks for module in flow.modules())


def test_where_the_loss_went_wrong():
    flow = snf_ext.Flow(
        [snf_ext.SelfNormLinear(3), Nest([snf_ext.SelfNormLinear(3), snf_ext.ActNorm(3)])], (3,)
    )
    x = torch.randn(4, 3)
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    random = torch.get_rng_state()
    assert first_not_finite(flow, x) == ""
    for name, value in flow.state_dict().items():  # of the actnorm too, which was shown nothing
        assert torch.equal(value, state[name])
    assert torch.equal(random, torch.get_rng_state())
    weight, inverse = (getattr(flow.bijections[1].rest[0], n) for n in ("weight", "weight_inv"))
    inverse.data[0, 0] = math.inf
    found = "first in recon of bijections.1.rest.0, SelfNormLinear; its weight_inv is not finite"
    assert first_not_finite(flow, x) == found
    inverse.data[0, 0], weight.data[0, 0] = 0.0, 1e30  # finite: what it makes of x is not
    found = "first in recon of bijections.1.rest.0, SelfNormLinear"
    assert first_not_finite(flow, x) == found
    with pytest.raises(snf_ext.Diverged, match=r"the loss is nan \(x is not finite\) in step 0"):
        DivergenceGuard(flow).check(math.nan, x / 0)


def test_a_search_that_fails_does_not_hide_the_finding():
    x = torch.randn(4, 1, 2, 3)
    with pytest.raises(
        snf_ext.Diverged, match=r"the loss is inf \(where, is not known: .*in step 0"
    ):
        DivergenceGuard(small_flows.conditional()).check(math.inf, x)  # without its context


def test_a_norm_that_overflows_is_no_failure():
    flow = nested(snf_ext.SelfNormLinear(36))
    guard = DivergenceGuard(flow, 1)
    with guard.step():
        loss = flow.loss(torch.randn(4, 36))
        loss.backward()
    for p in flow.parameters():
        p.grad.fill_(1e30)
    guard.check(loss, torch.randn(4, 36))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": -1}, "every must be an int of at least 0; got -1"),
        ({"every": 1.5}, "every must be an int of at least 0; got 1.5"),
        ({"recon_limit": 0.0}, "recon_limit must be positive; got 0.0"),
        ({"inverse_limit": math.nan}, "inverse_limit must be positive; got nan"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DivergenceGuard(nested(snf_ext.SelfNormLinear(36)), **arguments)


# ---- the training loop


def plant_loss(run, steps):
    def poison(*_):
        if len(steps) == 8:
            run.flow.bijections[4].weight.data[0, 0] = math.inf

    run.optimizer.register_step_post_hook(poison)
    return 9, r"the loss is .* \(first in z of bijections.4, SelfNormLinear; its weight is not fi"


def plant_gradient(run, steps):
    def poison(gradient):
        return gradient * (math.nan if len(steps) == 9 else 1)

    run.flow.bijections[4].weight.register_hook(poison)
    return 10, r"the gradient of bijections.4.weight is not finite"


def plant_reconstruction(run, steps):
    def poison(*_):
        if len(steps) == 8:
            run.flow.bijections[6].weight_inv.data.mul_(100)

    run.optimizer.register_step_post_hook(poison)
    return 10, r"the relative reconstruction error of bijections.6 \(SelfNormLinear\) is .*e\+03"


def plant_inverse(run, steps):
    run.guard.recon_limit = math.inf

    def poison(*_):
        if len(steps) == 8:
            run.flow.bijections[6].weight_inv.data.mul_(-20)

    run.optimizer.register_step_post_hook(poison)
    return 10, r"\|\|I - R W\|\| of bijections.6 \(SelfNormLinear\) is 2.*, over the limit of 10,"


CAUSES = (plant_loss, plant_gradient, plant_reconstruction, plant_inverse)


@pytest.mark.parametrize("plant", CAUSES, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("clip_norm", [None, 100.0])
def test_a_planted_cause_stops_the_run(tmp_path, plant, clip_norm):
    run = new_run(tmp_path, replace(CHECKED, clip_norm=clip_norm, check_inverse=True))
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    step, message = plant(run, steps)
    message += rf".* in epoch 2, step {step}; the last good checkpoint is .*last.pt \(epoch 1, "
    with pytest.raises(snf_ext.Diverged, match=message):
        run.fit()
    assert len(steps) == step - 1  # the optimizer did not make use of it
    flow = snf_ext.models.fc(DATA.event_shape, pixel_levels=17)
    content = checkpoint.load(tmp_path / "last.pt", resume=True)
    checkpoint.load_weights(flow, content, tmp_path / "last.pt")
    nll = evaluate.negative_log_likelihood(flow, DATA.val, CONFIG.seed).mean().item()
    assert content["epoch"] == 1
    assert nll == pytest.approx(content["val_nll"], rel=1e-9)


def test_a_gradient_is_checked_in_every_step_where_its_norm_is_known(tmp_path):
    run = new_run(tmp_path, replace(CONFIG, check_every=0))
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _, message = plant_gradient(run, steps)
    with pytest.raises(snf_ext.Diverged, match=message + " in epoch 2, step 10"):
        run.fit()
    assert all(p.isfinite().all() for p in run.flow.parameters())


def test_without_checks_what_is_not_finite_is_found_a_step_later(tmp_path):
    run = new_run(tmp_path, replace(CONFIG, check_every=0, clip_norm=None))
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    plant_gradient(run, steps)
    message = r"first in z of bijections.4, .*; its weight is not finite\) in epoch 2, step 11"
    with pytest.raises(snf_ext.Diverged, match=message):
        run.fit()


def test_a_healthy_run_has_the_same_bits(tmp_path):
    settings = {"plain": (0, False), "checked": (1, True)}
    for name, (every, inverse) in settings.items():
        (tmp_path / name).mkdir()
        run = new_run(tmp_path / name, replace(CONFIG, check_every=every, check_inverse=inverse))
        assert run.fit()
        for file in ("last.pt", "best.pt"):
            content = checkpoint.load(tmp_path / name / file)
            assert content["config"].pop("check_every") == every
            assert content["config"].pop("check_inverse") == inverse
            checkpoint.save(tmp_path / name / file, content)
    same_run(*(tmp_path / name for name in settings))
