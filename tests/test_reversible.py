"""Reversible training: the gradients of the ordinary mode, of which the graph is not kept."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from bijections_table import BIJECTIONS
from reversible_twins import (
    MODELS,
    Watched,
    assert_same,
    assert_same_state,
    gradients,
    images,
    likelihood,
    loss,
    twins,
)
from small_flows import ContextAffine, Nest, conditional
from training_runs import CONFIG, new_run

import snf_ext
from snf_ext import Reversible, cli, graphed
from snf_ext.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


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
