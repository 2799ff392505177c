"""Reversible training: the gradients of the ordinary mode, of which the graph is not kept."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from bijections_table import BIJECTIONS
from small_flows import ContextAffine, Nest, conditional
from test_training import CONFIG, new_run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import snf_ext
from snf_ext import NotReversible, Reversible, cli, graphed
from snf_ext.bijection import FlowStep, per_sample_zeros
from snf_ext.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-4}

MODELS = {
    "fc": lambda: snf_ext.models.fc((1, 8, 8), layers=3),
    "fc-exact": lambda: snf_ext.models.fc((1, 4, 4), linear="exact"),
    "fc-relative": lambda: snf_ext.models.fc((1, 4, 4), linear="relative"),
    "fc-tracked": lambda: snf_ext.models.fc((1, 8, 8), inverse="tracked"),
    "fc-symmetric": lambda: snf_ext.models.fc((1, 4, 4), inverse="symmetric"),
    "fc-debiased": lambda: snf_ext.models.fc((1, 8, 8), inverse="tracked", debias=2),
    "fc-conditional": lambda: snf_ext.models.fc((1, 4, 4), context_features=3),
    "conv": lambda: snf_ext.models.conv((1, 8, 8), layers=6, inverse_kernel_size=5),
    "conv-exponential": lambda: snf_ext.models.conv((1, 4, 4), 3, conv="exponential"),
    "conv-emerging": lambda: snf_ext.models.conv((1, 4, 4), 3, conv="emerging"),
    "conv-debiased": lambda: snf_ext.models.conv((1, 8, 8), 3, debias=1, inverse="inverse-only"),
    "glow": lambda: snf_ext.models.glow((1, 8, 8), levels=3, steps=2, width=6),
    "glow-conditional": lambda: snf_ext.models.glow(
        (2, 4, 4), 2, 2, 6, "lu", coupling="additive", context_features=3
    ),
}


def twins(flow, dtype=torch.float64, how=None):
    """A flow away from where it starts, and the same as a reversible one."""
    flow = flow.to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.02 * torch.randn_like(p) / max(1, p[:1].numel()) ** 0.5
    reversible = copy.deepcopy(flow)
    reversible.reversible = how or Reversible()
    return flow, reversible


def images(flow, batch=5, dtype=torch.float64):
    x = torch.randint(flow.bijections[0].levels, (batch, *flow.event_shape)).to(dtype)
    k = flow.context_features
    return (x, torch.randn(batch, k, dtype=dtype).requires_grad_()) if k else (x,)


def gradients(flow, function, *inputs):
    """The value of a pass, and the gradients of parameters and inputs, all drawn from one seed."""
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    flow.zero_grad()
    torch.manual_seed(3)
    value = function(flow, *inputs)
    value.backward()
    tensors = {**dict(flow.named_parameters()), **dict(enumerate(inputs))}
    return value.detach(), {name: t.grad for name, t in tensors.items() if t.grad is not None}


def assert_same(ordinary, reversible, function, *inputs):
    """Value and state to the bit; gradients to the error of what is rebuilt."""
    value, want = gradients(ordinary, function, *inputs)
    assert want
    got_value, got = gradients(reversible, function, *inputs)
    assert torch.equal(value, got_value)
    assert want.keys() == got.keys()
    tolerance = GRADIENT[next(ordinary.parameters(), value).dtype]
    largest = max(g.norm() for g in want.values())
    for name, g in want.items():
        assert (got[name] - g).norm() <= tolerance * max(g.norm(), 1e-6 * largest), name
    assert_same_state(ordinary, reversible)


def assert_same_state(ordinary, reversible):
    want, got = ordinary.state_dict(), reversible.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(t, got[name]) for name, t in want.items())


def loss(flow, *inputs):
    return flow.loss(*inputs)


def likelihood(flow, *inputs):
    return flow.log_prob(*inputs).mean()


# ---- the gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_ordinary_gradients(name, dtype):
    flow, reversible = twins(MODELS[name](), dtype)
    inputs = images(flow, dtype=dtype)
    assert_same(flow, reversible, loss, *inputs)
    assert_same(flow, reversible, loss, *inputs)  # actnorm has started
    assert_same(flow, reversible, likelihood, *inputs)
    assert_same(flow.eval(), reversible.eval(), likelihood, *inputs)


@pytest.mark.parametrize("name", ["fc", "conv", "glow"])
def test_so_has_the_reference(name):
    with snf_ext.use_backend("reference"):
        flow, reversible = twins(MODELS[name]())
        assert_same(flow, reversible, loss, *images(flow))


@pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
def test_every_bijection_has_the_ordinary_gradients(case):
    bijections = [case.build()]
    if not case.unit_interval:
        bijections.insert(0, Watched().double())
    flow = snf_ext.Flow(bijections, case.event_shape)
    # Some of the table's learned inverses are too poor to refine.
    reversible = copy.deepcopy(flow)
    reversible.reversible = Reversible(exact=True)
    x = case.data()
    inputs = [x.requires_grad_()]
    if case.context_shape is not None:
        context = case.context(x.detach()).requires_grad_()
        flow.context_features = reversible.context_features = 0
        flow._check_context = reversible._check_context = lambda *args: None
        inputs.append(context)
    assert_same(flow, reversible, loss, *inputs)
    assert_same(flow, reversible, likelihood, *inputs)


@pytest.mark.parametrize("name", ["fc", "conv", "glow"])
def test_after_training_side_by_side(name):
    flow, reversible = twins(MODELS[name](), torch.float32)
    pairs = [(f, torch.optim.Adam(f.parameters(), lr=1e-3)) for f in (flow, reversible)]
    losses = []
    for step in range(15):
        (x,) = images(flow, 8, torch.float32)
        for f, optimizer in pairs:
            torch.manual_seed(step)
            optimizer.zero_grad()
            value = f.loss(x)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    # Rounding grows from step to step, so the weights are compared loosely and the gradient again.
    assert losses[-1] == pytest.approx(losses[-2], rel=1e-3)
    reversible.load_state_dict(flow.state_dict())
    assert_same(flow, reversible, loss, *images(flow, 8, torch.float32))


def test_context_and_nested_bijections():
    flow, reversible = twins(conditional())
    inputs = images(flow)
    assert_same(flow, reversible, loss, *inputs)
    assert isinstance(flow.bijections[-1], ContextAffine)
    assert isinstance(flow.bijections[-2], Nest)


def test_options_of_the_loss():
    flow, reversible = twins(MODELS["glow"]())
    for f in (flow, reversible):
        f.recon_weight = 7.0
    how = {"log_det_penalty": 0.1, "bits_per_dim": True}
    assert_same(flow, reversible, lambda f, x: f.loss(x, **how), *images(flow))


def test_only_what_is_asked_for():
    flow, reversible = twins(MODELS["conv"]())
    (x,) = images(flow)
    for f in (flow, reversible):
        f.bijections[3].requires_grad_(False)
        f.bijections[8].weight.requires_grad_(False)
    assert_same(flow, reversible, loss, x)

    def grad(f):
        torch.manual_seed(3)
        return torch.autograd.grad(f.loss(x), [f.bijections[5].weight])[0]

    torch.testing.assert_close(grad(reversible), grad(flow), rtol=1e-9, atol=0)
    # Without z: what the log_det of the splines sends back to the layers before them.
    assert_same(flow, reversible, lambda f, x: f(x).log_det.sum(), x)
    assert_same(flow, reversible, lambda f, x: f(x).recon.sum(), x)


def test_gradients_add_up():
    flow, reversible = twins(MODELS["glow"]())
    batches = [images(flow)[0] for _ in range(2)]

    def both(f, *xs):  # two graphs at once
        return sum(f.loss(x) for x in xs)

    for f in (flow, reversible):  # a batch of actnorm's start needs its backward at once
        torch.manual_seed(3)
        f.loss(batches[0]).backward()
    assert_same(flow, reversible, both, *batches)
    for f in (flow, reversible):
        f.zero_grad()
        for x in batches:
            torch.manual_seed(3)
            f.loss(x).backward()
    for a, b in zip(flow.parameters(), reversible.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9 * a.grad.abs().max().item())


def test_autocast_is_that_of_the_forward_pass():
    flow, reversible = twins(MODELS["glow"](), torch.float32)

    def under_autocast(f, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f.loss(x)

    assert_same(flow, reversible, under_autocast, *images(flow, dtype=torch.float32))


def test_the_backend_is_that_of_the_forward_pass():
    _, reversible = twins(MODELS["fc"]())
    seen = []
    reversible.bijections[4].register_forward_hook(lambda *args: seen.append(snf_ext.backend()))
    with snf_ext.use_backend("reference"):
        value = reversible.loss(*images(reversible))
    before = snf_ext.backend()
    value.backward()
    assert seen == ["reference", "reference"]
    assert snf_ext.backend() == before


def test_half_precision_keeps_its_inputs():
    flow, reversible = twins(MODELS["fc"](), torch.bfloat16)
    (x,) = images(flow, dtype=torch.bfloat16)
    values = [gradients(f, loss, x) for f in (flow, reversible)]
    assert torch.equal(values[0][0], values[1][0])
    assert all(torch.equal(g, values[1][1][name]) for name, g in values[0][1].items())


def test_without_gradients_nothing_is_kept():
    flow, reversible = twins(MODELS["glow"]())
    (x,) = images(flow)
    with torch.no_grad():
        torch.manual_seed(3)
        z = flow(x).z
        torch.manual_seed(3)
        step = reversible(x)
    assert torch.equal(step.z, z)
    assert step.z.grad_fn is None
    assert_same_state(flow, reversible)
    assert reversible(x[:0]).z.shape == (0, 64)
    reversible(x[:0]).z.sum().backward()


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


class Watched(snf_ext.Bijection):
    """Remembers its inputs, as long as anybody else does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.inputs = []

    def forward(self, x, context=None):
        self.inputs.append(StorageWeakRef(x.untyped_storage()))
        zeros = per_sample_zeros(x)
        log_det = zeros + math.prod(x.shape[1:]) * self.scale.log()
        return FlowStep(x * self.scale, log_det, zeros)

    def inverse(self, z, context=None, exact=False):
        return z / self.scale


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


# ---- autograd, graphs and copies


def test_double_backward_is_refused():
    _, flow = twins(MODELS["fc"]())
    (x,) = images(flow)
    with pytest.raises(NotImplementedError, match="double backward through a reversible flow"):
        torch.autograd.grad(flow.loss(x), list(flow.parameters()), create_graph=True)


def test_backward_twice_and_too_late():
    flow, reversible = twins(MODELS["fc"]())
    (x,) = images(flow)
    torch.manual_seed(3)
    value = reversible.loss(x)
    value.backward(retain_graph=True)
    once = [p.grad.clone() for p in reversible.parameters()]
    value.backward()
    for p, g in zip(reversible.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    value = reversible.loss(x)
    with torch.no_grad():
        reversible.bijections[4].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_exchanged_parameters_are_refused():
    _, flow = twins(MODELS["fc"]())
    (x,) = images(flow)
    others = {name: p.detach().clone().requires_grad_() for name, p in flow.named_parameters()}
    value = torch.func.functional_call(flow, others, (x,)).z.sum()
    with pytest.raises(RuntimeError, match="must be the same tensors in backward"):
        value.backward()


def test_copies_and_checkpoints_are_as_before():
    flow, reversible = twins(MODELS["glow"]())
    assert flow.state_dict().keys() == reversible.state_dict().keys()
    for copied in (copy.deepcopy(reversible), pickle.loads(pickle.dumps(reversible))):
        assert copied.reversible == Reversible()
        assert_same(copy.deepcopy(flow), copied, loss, *images(flow))


def test_graphed_steps_are_eager_and_say_why(monkeypatch):
    _, flow = twins(MODELS["conv"](), torch.float32)
    step = snf_ext.GraphedStep(flow, torch.optim.SGD(flow.parameters(), lr=1e-5))
    monkeypatch.setattr(step._cuda, "type", "cpu")
    (x,) = images(flow, dtype=torch.float32)
    for _ in range(5):
        step(x)
    assert not step.graphed
    assert "flow is reversible" in step.reason
    assert isinstance(step._cuda, graphed._Cuda)


def test_compiled_flows_run_the_passes_eagerly():
    flow, reversible = twins(MODELS["conv"](), torch.float32)
    (x,) = images(flow, dtype=torch.float32)
    whole = torch.compile(reversible.loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="a reversible flow decides in Python"):
        whole(x)  # the first thing that is done
    torch._dynamo.reset()
    compiled = torch.compile(reversible.loss, backend="aot_eager")
    assert_same(flow, reversible, lambda f, x: compiled(x) if f is reversible else f.loss(x), x)


def test_nothing_else_is_taken_for_a_mode():
    flow = MODELS["conv"]()
    with pytest.raises(TypeError, match="reversible must be None or a Reversible; got True"):
        flow.reversible = True
    assert flow.reversible is None


# ---- the training command


def test_gradient_angles_are_measured_as_ever():
    flow, reversible = twins(MODELS["conv"]())
    angles = []
    for f in (flow, reversible):
        torch.manual_seed(3)
        angles.append(snf_ext.gradient_angle(f, images(flow)[0] * 0 + 3))
    assert angles[0] == angles[1]
    assert len(angles[0]) == 6
    assert reversible.reversible == Reversible()


def test_a_run_trains_reversibly(tmp_path):
    pytest.importorskip("ignite")
    runs = {}
    for name, mode in (("ordinary", False), ("reversible", True)):
        run = new_run(tmp_path / name, replace(CONFIG, epochs=1, reversible=mode))
        assert run.flow.reversible == (Reversible() if mode else None)
        assert run.fit()
        runs[name] = run.history[-1]
    assert runs["reversible"]["val_nll"] == pytest.approx(runs["ordinary"]["val_nll"], rel=1e-4)
    assert runs["reversible"]["angle"] == pytest.approx(runs["ordinary"]["angle"], rel=1e-2)
    saved = checkpoint.load(tmp_path / "reversible" / "last.pt", resume=True)
    assert saved["config"]["reversible"] is True


def test_a_run_that_cannot_be_rebuilt_stops_and_says_where(tmp_path):
    pytest.importorskip("ignite")
    run = new_run(tmp_path / "run", replace(CONFIG, epochs=1, reversible=True, check_every=0))
    with torch.no_grad():
        run.flow.bijections[4].weight_inv.zero_()
    with pytest.raises(snf_ext.Diverged, match=r"the input of bijections\.4 was rebuilt") as caught:
        run.fit()
    assert "train without --reversible" in str(caught.value)
    assert caught.value.step == 1


def test_the_command_line_asks_for_it():
    pytest.importorskip("tyro")
    for words, mode in ([], False), (["--reversible"], True):
        options = cli._parse(["train", "--model", "fc", *words])
        assert cli._config(options, None).reversible is mode
