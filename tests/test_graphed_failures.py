"""Graphed steps where a capture fails: said once, and eager steps as if it had never been tried."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from graph_world import fc, fused_adam, momentum, run_both

from snf_ext import graphed
from snf_ext.graphed import GraphedStep


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
