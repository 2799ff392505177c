"""Training steps as CUDA graphs: the same steps as an eager loop, graph or not.

Most tests run twice: on a GPU, and on the CPU against a stand-in for CUDA that keeps what a graph
keeps (the places of tensors, the values of numbers) and nothing else.
"""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from graph_world import World, conv, fc, fused_adam, held, momentum, run_both, tracked

import snf_ext
from snf_ext.graphed import MAX_GRAPHS, GraphedStep

# Where nothing can be captured


@pytest.mark.parametrize(
    "make_optimizer",
    [
        momentum,
        torch.optim.Adam,
        partial(torch.optim.Adam, fused=True),
        partial(torch.optim.AdamW, amsgrad=True),
        torch.optim.Adagrad,
    ],
)
def test_eager_on_the_cpu(make_optimizer, backend):
    world = World()
    twins = world.twins(fc, make_optimizer)
    step = GraphedStep(*twins[0], warmup=1)
    assert (step.graphed, step.reason) == (False, "no batch yet")
    assert run_both(world, twins, step, world.images(8, 8, 8, 3)) == [False] * 4
    assert step.reason == "x is on cpu: CUDA graphs need a CUDA device"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flow": torch.nn.Linear(2, 2)}, TypeError, "flow must be a Flow; got Linear"),
        ({"optimizer": "Adam"}, TypeError, "optimizer must be an Optimizer; got str"),
        ({"loss": 1.0}, TypeError, "loss must be callable; got float"),
        ({"after_backward": 1}, TypeError, "after_backward must be callable; got int"),
        ({"warmup": 0}, ValueError, "warmup must be at least 1; got 0"),
    ],
)
def test_bad_arguments(change, error, message):
    flow = fc()
    arguments = {"flow": flow, "optimizer": momentum(flow.parameters())} | change
    with pytest.raises(error, match=message):
        GraphedStep(**arguments)


def test_bad_batches():
    flow = fc()
    step = GraphedStep(flow, momentum(flow.parameters()))
    with pytest.raises(TypeError, match="x must be a Tensor; got list"):
        step([1.0])
    with pytest.raises(ValueError, match=r"events \[1, 8, 8\]; got \[3, 8, 8\]"):
        step(torch.zeros(3, 8, 8))


class Counting(torch.optim.SGD):
    """Keeps what a graph cannot change: a Python number for each parameter."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["steps"] = self.state[p].get("steps", 0) + 1


@pytest.mark.parametrize(
    ("make_optimizer", "change", "reason"),
    [
        (momentum, lambda flow: flow.eval(), "flow is in evaluation mode"),
        (
            partial(torch.optim.Adam, fused=True),
            lambda flow: None,
            "Adam has capturable=False; pass capturable=True",
        ),
        (Counting, lambda flow: None, "Counting keeps 'steps' off "),
        (
            lambda parameters: momentum(list(parameters)[1:]),
            lambda flow: None,
            "bijections.4.weight requires a gradient, but SGD does not have it",
        ),
    ],
)
def test_reasons(world, make_optimizer, change, reason):
    twins = world.twins(fc, make_optimizer)
    for flow, _ in twins:
        change(flow)
    step = GraphedStep(*twins[0], warmup=1)
    assert run_both(world, twins, step, world.images(*[8] * 3)) == [False] * 3
    assert step.reason.startswith(reason)
    assert world.captures == 0


def test_parameters_elsewhere(world):
    flow = fc().to("meta")
    step = GraphedStep(flow, momentum(flow.parameters()))
    (x,) = world.images(2)
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        step(x)
    assert step.reason == f"a parameter is on meta and x on {x.device}"


def test_contexts_that_a_graph_does_not_cover(world):
    """They make one step eager; the graph is still there afterwards."""
    (flow, optimizer), _ = world.twins(
        lambda: snf_ext.Flow([snf_ext.SelfNormLinear(4)], (4,)), momentum
    )
    step, x = GraphedStep(flow, optimizer, warmup=1), torch.randn(8, 4, device=world.device)
    step(x)
    step(x)
    assert step.graphed
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        step(x)
    assert step.reason == "gradients are disabled"
    with torch.autocast(world.device, dtype=torch.bfloat16):
        step(x)
    assert step.reason == "autocast is on, which graphs do not cover"
    wants_grad = x.clone().requires_grad_()
    step(wants_grad)
    assert step.reason.startswith("x requires a gradient")
    assert wants_grad.grad is not None
    step(x)
    assert step.graphed
    assert world.captures == 1


# What is captured


@pytest.mark.parametrize("make_flow", [fc, conv, tracked, held])
@pytest.mark.parametrize("make_optimizer", [fused_adam, momentum])
def test_the_same_steps_as_an_eager_loop(world, make_flow, make_optimizer):
    if make_flow in (conv, tracked) and world.device == "cuda" and not snf_ext.build_info()["cuda"]:
        pytest.skip("needs the CUDA kernels")
    twins = world.twins(make_flow, make_optimizer)
    step = GraphedStep(*twins[0], warmup=3)
    flags = run_both(world, twins, step, world.images(*[16] * 10))
    assert flags == [False] * 3 + [True] * 7
    assert step.reason is None
    assert world.captures == 1
    if world.device == "cpu":
        assert world.cuda.replays == 7


@pytest.mark.cuda
def test_adam_of_many_kernels(gpu):
    """``foreach`` with ``capturable`` works on a GPU only."""
    twins = gpu.twins(fc, partial(torch.optim.Adam, lr=1e-2, capturable=True))
    step = GraphedStep(*twins[0])
    flags = run_both(gpu, twins, step, gpu.images(*[16] * 10))
    assert flags == [False] * 3 + [True] * 7


def test_warming_up_is_said(world):
    (flow, optimizer), _ = world.twins(fc, momentum)
    step, (x,) = GraphedStep(flow, optimizer, warmup=2), world.images(4)
    step(x)
    assert step.reason == "warming up, step 1 of 2"
    step(x)
    assert step.reason == "warming up, step 2 of 2"


def test_a_refused_batch_is_no_warm_up(world):
    (flow, optimizer), _ = world.twins(fc, momentum)
    step = GraphedStep(flow, optimizer, warmup=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="events"):
            step(torch.zeros(8, 2, device=world.device))
    assert world.captures == 0


def test_shorter_last_batches(world):
    """They get a graph of their own after as many eager steps, and leave the first one alone."""
    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=2)
    flags = run_both(world, twins, step, world.images(*[16, 16, 16, 7] * 5))
    assert flags == [False, False, True, False] + [True, True, True, False] + [True] * 12
    assert world.captures == 2


def test_dtypes_are_kept_apart(world):
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)
    bytes_ = world.images(8, 8, 8)
    flags = run_both(world, twins, step, [*bytes_, *(0.5 * x.float() for x in bytes_)])
    assert flags == [False, True, True] * 2


def test_few_shapes_get_graphs(world):
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1)
    sizes = [size for size in range(1, MAX_GRAPHS + 3) for _ in range(2)]
    flags = run_both(world, twins, step, world.images(*sizes, 1))
    assert flags == [False, True] * MAX_GRAPHS + [False] * 4 + [True]
    step(*world.images(MAX_GRAPHS + 1))
    assert step.reason == f"{MAX_GRAPHS} other shapes have graphs"


@pytest.mark.cuda
def test_replays_allocate_nothing_that_stays(gpu):
    (flow, optimizer), _ = gpu.twins(fc, fused_adam)
    step, batches = GraphedStep(flow, optimizer, warmup=1), gpu.images(16, 7)

    def run(times):
        for _ in range(times):
            for x in batches:
                step(x)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = run(4)
    assert step.graphed
    assert run(20) == before


def test_no_warnings_otherwise(world):
    (flow, optimizer), _ = world.twins(fc, fused_adam)
    step, (x,) = GraphedStep(flow, optimizer, warmup=1), world.images(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step(x)
    assert step.graphed
