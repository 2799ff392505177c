"""Graphed steps: what changes between steps is seen, and the steps stay those of the eager loop."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_world import fc, fused_adam, momentum, run_both

from snf_ext.graphed import GraphedStep


def test_a_new_learning_rate_makes_a_new_graph(world):
    def between(index, flow, optimizer):
        optimizer.param_groups[0]["lr"] = 1e-2 if index < 4 else 1e-3

    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=2)
    flags = run_both(world, twins, step, world.images(*[8] * 8), between)
    assert flags == [False, False, True, True] * 2
    assert world.captures == 2
    step(*world.images(3))
    assert step.reason == "warming up, step 1 of 2"


def test_a_setting_that_an_eager_step_changes(world):
    """Graphs of other shapes must not go on with the old one."""

    def loss(flow, optimizer):
        def halving(x):
            if len(x) == 5:
                optimizer.param_groups[0]["lr"] *= 0.5
            return flow.loss(x)

        return halving

    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=1, loss=loss(*twins[0]))
    batches = world.images(8, 8, 5, 8, 8)
    flags = run_both(world, twins, step, batches, loss=loss(*twins[1]))
    assert flags == [False, True, False, True, True]
    assert world.captures == 2


def test_a_learning_rate_that_always_changes_is_named(world):
    def between(index, flow, optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + index)

    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=1)
    assert not any(run_both(world, twins, step, world.images(*[8] * 5), between))
    assert step.reason == "warming up, step 1 of 1, because lr of parameter group 0 changed"
    assert world.captures == 0


def test_a_learning_rate_in_a_tensor_changes_under_the_graph(world):
    def between(index, flow, optimizer):
        if index:
            optimizer.scheduler.step()

    def make_optimizer(parameters):
        optimizer = fused_adam(parameters, lr=torch.tensor(1e-2, device=world.device))
        optimizer.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return optimizer

    flow = fc().to(world.device)
    twins = [(f, make_optimizer(f.parameters())) for f in (flow, copy.deepcopy(flow))]
    step = GraphedStep(*twins[0], warmup=1)
    flags = run_both(world, twins, step, world.images(*[8] * 5), between)
    assert flags == [False] + [True] * 4
    assert world.captures == 1


def test_tensors_elsewhere_are_known_by_their_values():
    """A kernel gets a number from the CPU when it is launched, that is, captured."""
    flow = fc()
    step = GraphedStep(flow, momentum(flow.parameters()))
    assert step._value_or_place((torch.tensor(0.5), 0.25)) == [0.5, 0.25]


@pytest.mark.cuda
def test_a_learning_rate_in_a_tensor_on_the_cpu(gpu):
    """Its value is part of the graph."""

    def between(index, flow, optimizer):
        if index == 3:
            optimizer.param_groups[0]["lr"].fill_(1e-3)

    twins = gpu.twins(fc, lambda parameters: fused_adam(parameters, lr=torch.tensor(1e-2)))
    step = GraphedStep(*twins[0], warmup=1)
    flags = run_both(gpu, twins, step, gpu.images(*[8] * 5), between)
    assert flags == [False, True, True, False, True]


def change_recon_weight(flow, optimizer):
    flow.recon_weight = 7.0


def freeze(flow, optimizer):
    next(flow.parameters()).requires_grad_(False)


def move_a_parameter(flow, optimizer):
    p = next(flow.parameters())
    p.data = p.data * 0.5


def change_a_mode(flow, optimizer):
    flow.bijections[5].eval()


def load_optimizer(flow, optimizer):
    content = copy.deepcopy(optimizer.state_dict())
    for entries in content["state"].values():
        entries["exp_avg"] *= 2
    optimizer.load_state_dict(content)


def add_group(flow, optimizer):
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.1})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_recon_weight, "recon_weight"),
        (freeze, "what requires a gradient"),
        (change_a_mode, "the mode of a module"),
        (move_a_parameter, "the place of a parameter"),
        (load_optimizer, "the optimizer's state"),
        (add_group, "lr of parameter group 1"),
    ],
)
def test_changes_are_seen(world, change, name):
    """The steps stay those of the eager loop, by a new graph."""
    seen = []

    def between(index, flow, optimizer):
        if index == 4:
            change(flow, optimizer)
        if flow is twins[0][0]:
            seen.append(step.reason)

    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=2)
    flags = run_both(world, twins, step, world.images(*[8] * 8), between)
    assert flags == [False, False, True, True] * 2
    assert seen[5] == f"warming up, step 1 of 2, because {name} changed"


def test_other_changes_need_a_reset(world):
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)

    def between(index, flow, optimizer):
        if index == 2:
            flow.bijections[5].alpha = 0.9
            step.reset()

    flags = run_both(world, twins, step, world.images(*[8] * 4), between)
    assert flags == [False, True, False, True]


def test_evaluation_between_steps(world):
    """As in a training loop: neither the mode nor the factorisation is in the graph's way."""
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)

    def between(index, flow, optimizer):
        with torch.no_grad():
            flow.eval().log_prob(world.images(4)[0])
        flow.train()

    flags = run_both(world, twins, step, world.images(*[8] * 4), between)
    assert flags == [False, True, True, True]


def test_gradients_of_the_user(world):
    """Whatever becomes of ``p.grad`` between steps, the next one starts without."""

    def between(index, flow, optimizer):
        for number, p in enumerate(flow.parameters()):
            if index == 3 or number == 1:
                p.grad = None
            elif index == 4:
                p.grad = torch.ones_like(p)
            elif index == 5:
                p.grad.fill_(100.0)

    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)
    flags = run_both(world, twins, step, world.images(*[8] * 7), between)
    assert flags == [False] + [True] * 6


def test_gradients_between_graphs(world):
    """After each step ``p.grad`` is that step's, whichever graph it was."""
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)
    grads = {id(flow): [] for flow, _ in twins}

    def between(index, flow, optimizer):
        if index:
            grads[id(flow)] += [p.grad.clone() for p in flow.parameters()]

    run_both(world, twins, step, world.images(*[8, 8, 5, 5, 8, 5, 8]), between)
    world.assert_same(*grads.values())


def test_clipping(world):
    def clip(flow):
        return lambda: torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.5)

    twins = world.twins(fc, momentum)
    (flow, optimizer), (eager_flow, _) = twins
    step = GraphedStep(flow, optimizer, warmup=1, after_backward=clip(flow))
    batches = world.images(*[8] * 4)
    flags = run_both(world, twins, step, batches, after_backward=clip(eager_flow))
    assert flags == [False, True, True, True]
    norms = torch.stack([p.grad.norm() for p in flow.parameters()])
    assert norms.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_own_loss(world):
    def loss(flow):
        return lambda x: 2 * flow.loss(x) + flow.bijections[-1].weight.square().sum()

    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1, loss=loss(twins[0][0]))
    batches = world.images(*[8] * 4)
    flags = run_both(world, twins, step, batches, loss=loss(twins[1][0]))
    assert flags == [False, True, True, True]
