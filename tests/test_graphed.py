"""Training steps as CUDA graphs: the same steps as an eager loop, graph or not.

Most tests run twice: on a GPU, and on the CPU against a stand-in for CUDA that keeps what a graph
keeps (the places of tensors, the values of numbers) and nothing else.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from graph_world import StandIn, World, conv, fc, held, make_world, run_both, tracked

import snf_ext
from snf_ext import graphed
from snf_ext.graphed import MAX_GRAPHS, GraphedStep

fused_adam = partial(torch.optim.Adam, lr=1e-2, fused=True, capturable=True)
momentum = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)


@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return make_world(graphed._Cuda(), monkeypatch)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.cuda)])
def world(request, monkeypatch):
    if request.param == "cuda":
        return request.getfixturevalue("gpu")
    return make_world(StandIn(), monkeypatch)


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


# What changes between steps


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


# When a capture fails


def test_an_error_while_capturing(world):
    """One warning, then eager steps; parameters, state and random numbers are as without it."""

    def loss(flow):
        def wait(x):
            value = flow.loss(x)
            world.wait()
            return value

        return wait

    twins = world.twins(fc, fused_adam)
    step = GraphedStep(*twins[0], warmup=2, loss=loss(twins[0][0]))
    with pytest.warns(RuntimeWarning, match="training steps run eagerly: capture failed") as record:
        flags = run_both(world, twins, step, world.images(*[8, 8, 8, 5, 5, 5, 8, 8]))
    assert flags == [False] * 8
    (warning,) = [w for w in record if w.category is RuntimeWarning]
    assert warning.filename == run_both.__code__.co_filename  # whose code calls the step
    if world.device == "cpu":
        assert step.reason.startswith("capture failed: RuntimeError: CUDA error: not permitted ")
    assert step.reason.endswith("; reset() allows another try")
    assert "\n" not in step.reason
    assert world.captures == 1
    step.reset()
    (x,) = world.images(8)
    step(x)
    step(x)
    with pytest.warns(RuntimeWarning, match="capture failed"):
        step(x)
    assert world.captures == 2


def test_a_failed_capture_leaves_other_graphs(world):
    def loss(flow):
        def wait(x):
            value = flow.loss(x)
            if len(x) == 5:
                world.wait()
            return value

        return wait

    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1, loss=loss(twins[0][0]))
    with pytest.warns(RuntimeWarning, match="capture failed"):
        flags = run_both(world, twins, step, world.images(*[8, 8, 5, 5, 8, 8]))
    assert flags == [False, True, False, False, True, True]


class Scheduled(torch.optim.SGD):
    """Changes its own settings in every step."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["lr"] *= 0.5


class Replacing(torch.optim.SGD):
    """Makes its state anew in every step."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = self.state[p]["momentum_buffer"] * 0.5


@pytest.mark.parametrize(
    ("make_optimizer", "name"),
    [
        (partial(Scheduled, lr=1e-4), "lr of parameter group 0"),
        (partial(Replacing, lr=1e-4, momentum=0.9), "the optimizer's state"),
    ],
)
def test_optimizers_that_change_what_a_graph_fixes(world, make_optimizer, name):
    twins = world.twins(fc, make_optimizer)
    step = GraphedStep(*twins[0], warmup=1)
    with pytest.warns(RuntimeWarning, match=f"RuntimeError: {name} changes in every step"):
        flags = run_both(world, twins, step, world.images(*[8] * 4))
    assert flags == [False] * 4
    assert twins[0][1].param_groups[0]["lr"] == twins[1][1].param_groups[0]["lr"]


def test_random_numbers_of_the_cpu(world):
    """A graph would repeat them."""

    def loss(flow):
        return lambda x: flow.loss(x) * torch.rand(()).item()

    if world.device == "cpu":
        world.cuda.restores_random = False
    twins = world.twins(fc, momentum)
    step = GraphedStep(*twins[0], warmup=1, loss=loss(twins[0][0]))
    batches = world.images(*[8] * 4)
    with pytest.warns(RuntimeWarning, match="the step draws random numbers on the CPU"):
        flags = run_both(world, twins, step, batches, loss=loss(twins[1][0]))
    assert flags == [False] * 4


class Torch:
    """Records what ``_Cuda`` asks of torch; captures end badly if ``breaks``."""

    def __init__(self, monkeypatch, breaks):
        self.log, self.breaks, self.open = [], breaks, False
        self.device, self.device_index = torch.device("cuda", 1), 1
        for name, value in {
            "Stream": lambda device: self,
            "stream": lambda stream: self.entered("stream"),
            "CUDAGraph": lambda: self,
            "graph": lambda graph, **options: self.entered("graph"),
            "graph_pool_handle": lambda: (0, 7),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: self.log.append("work"))

    @contextmanager
    def entered(self, name):
        self.log.append(f"enter {name}")
        try:
            yield
        finally:
            self.log.append(f"leave {name}")
            if name == "graph" and self.breaks:
                self.open, self.breaks = True, False
                raise RuntimeError("the end failed because of an earlier error")

    def end(self, index, pool):
        if not self.open:
            raise RuntimeError("not recording")
        self.log.append(f"end {index} {pool}")

    def release(self, index, pool):
        self.log.append(f"release {index} {pool}")


@pytest.mark.parametrize("breaks", [True, False])
def test_what_a_failed_capture_leaves_is_mended(monkeypatch, breaks):
    """In the order that torch needs: only then does a capture that ends well succeed."""
    fake = Torch(monkeypatch, breaks)
    monkeypatch.setattr(graphed._Cuda, "_broken", [])

    def work():
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        graphed._Cuda().capture(fake.device, work)
    captured = ["enter stream", "enter graph", "leave graph", "leave stream"]
    mended = ["end 1 (0, 7)", "release 1 (0, 7)", *captured[:2], "work", *captured[2:]]
    assert fake.log == captured + (mended if breaks else [])
    assert graphed._Cuda._broken == ([fake] if breaks else [])


@pytest.mark.cuda
def test_torch_works_after_a_failed_capture(gpu):
    (flow, optimizer), _ = gpu.twins(fc, momentum)
    step = GraphedStep(flow, optimizer, warmup=1, loss=lambda x: gpu.wait() or flow.loss(x))
    (x,) = gpu.images(8)
    stream = torch.cuda.current_stream()
    step(x)
    with pytest.warns(RuntimeWarning, match="capture failed"):
        step(x)
    assert torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")
    torch.cuda.empty_cache()
    again = GraphedStep(flow, optimizer, warmup=1)
    again(x)
    again(x)
    assert again.graphed


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
