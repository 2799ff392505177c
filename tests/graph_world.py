"""Where the tests of graphed steps run: a GPU, or what stands in for one; and both ways to step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import snf_ext
from snf_ext import graphed

fused_adam = partial(torch.optim.Adam, lr=1e-2, fused=True, capturable=True)
momentum = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)


class StandIn:
    """Takes the CPU for a GPU. While it captures, no value changes; a replay does what the work
    did with the settings and in the storages of then."""

    type = "cpu"
    restores_random = True

    def __init__(self):
        self.replays = 0
        self.capturing = False

    def aside(self, device, work):
        return work()

    def capture(self, device, work):
        step = work.func.__self__
        optimizer, flow = step.optimizer, step.flow
        parameters = list(flow.parameters())
        starts = [p.grad for p in parameters]
        tensors = [*parameters, *flow.buffers(), *self._state(optimizer)]
        values = [t.detach().clone() for t in tensors]
        random, self.capturing = torch.get_rng_state(), True
        try:
            loss = work()
        finally:
            self.capturing = False
            with torch.no_grad():
                for t, value in zip(tensors, values, strict=True):
                    t.copy_(value)
            if self.restores_random:
                torch.set_rng_state(random)
        grads = [p.grad for p in parameters]
        storages, fixed = [p.data for p in parameters], self._python(flow, optimizer)

        def replay():
            self.replays += 1
            now, data = self._python(flow, optimizer), [p.data for p in parameters]
            self._set_python(flow, optimizer, fixed)
            for p, storage, start in zip(parameters, storages, starts, strict=True):
                p.data, p.grad = storage, start
            loss.copy_(work())
            for p, grad, own in zip(parameters, grads, data, strict=True):
                if grad is not None:
                    grad.copy_(p.grad)
                p.data, p.grad = own, None
            self._set_python(flow, optimizer, now)

        return replay, loss

    @staticmethod
    def _state(optimizer):
        entries = [v for entries in optimizer.state.values() for v in entries.values()]
        return [v for v in entries if isinstance(v, torch.Tensor)]

    @staticmethod
    def _python(flow, optimizer):
        state = {p: dict(entries) for p, entries in optimizer.state.items()}
        groups = [dict(group) for group in optimizer.param_groups]
        return flow.recon_weight, [p.requires_grad for p in flow.parameters()], groups, state

    @staticmethod
    def _set_python(flow, optimizer, python):
        flow.recon_weight, flags, groups, state = python
        for p, flag in zip(flow.parameters(), flags, strict=True):
            p.requires_grad_(flag)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        for p, entries in state.items():
            optimizer.state[p] = entries


class World:
    """A device, and how many captures were made on it."""

    def __init__(self, cuda=None):
        self.device = cuda.type if cuda else "cpu"
        self.cuda = cuda
        self.captures = 0

    def twins(self, make_flow, make_optimizer):
        """A flow and its optimizer, twice."""
        flow = make_flow().to(self.device)
        return [(f, make_optimizer(f.parameters())) for f in (flow, copy.deepcopy(flow))]

    def images(self, *sizes):
        generator = torch.Generator().manual_seed(5)
        return [
            torch.randint(0, 256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8).to(
                self.device
            )
            for size in sizes
        ]

    def wait(self):
        """What a graph cannot hold."""
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()
        elif self.cuda.capturing:
            raise RuntimeError("CUDA error: not permitted when stream is capturing\nmore")

    def assert_same(self, got, want):
        """Bit for bit; on a GPU up to the order of sums."""
        tolerance = 0.0 if self.device == "cpu" else 1e-6
        torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=tolerance)


def make_world(cuda, monkeypatch):
    world, capture = World(cuda), cuda.capture

    def counted(device, work):
        world.captures += 1
        return capture(device, work)

    monkeypatch.setattr(cuda, "capture", counted)
    monkeypatch.setattr(graphed, "_Cuda", lambda: cuda)
    return world


def fc():
    return snf_ext.models.fc((1, 8, 8), layers=2)


def tracked():
    inverse = snf_ext.Tracked(every=3)
    return snf_ext.Flow(
        [
            *snf_ext.models.preprocessing(),
            snf_ext.SelfNormConv2d(1, 3, inverse=inverse),
            snf_ext.layers.Flatten((1, 8, 8)),
            snf_ext.SelfNormLinear(64, inverse=inverse),
        ],
        (1, 8, 8),
    )


def held():
    return snf_ext.constrain(fc(), snf_ext.Relative())


def conv():
    bijections = [
        *snf_ext.models.preprocessing(),
        snf_ext.SelfNormConv2d(1, 3),
        snf_ext.SmoothLeakyReLU(0.3),
        snf_ext.Squeeze(),
        snf_ext.SelfNormConv2d(4, 3),
    ]
    return snf_ext.Flow(bijections, (1, 8, 8))


def eager_step(flow, optimizer, x, loss=None, after_backward=None):
    optimizer.zero_grad()
    value = (loss or flow.loss)(x)
    value.backward()
    if after_backward:
        after_backward()
    optimizer.step()
    return value.detach()


def snapshot(flow, optimizer, device):
    """All that a step may change."""
    random = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    return (
        [p.detach().clone() for p in flow.parameters()],
        [None if p.grad is None else p.grad.clone() for p in flow.parameters()],
        copy.deepcopy(optimizer.state_dict()["state"]),
        random,
    )


def run_both(world, twins, step, batches, between=lambda index, flow, optimizer: None, **options):
    """The same batches through ``step`` and through the eager loop: which steps were graphed.

    ``between`` runs on both before each step. ``options`` gives the eager step's.
    """
    (flow, optimizer), (eager_flow, eager_optimizer) = twins
    losses, flags, wanted = [], [], []
    torch.manual_seed(3)
    for index, x in enumerate(batches):
        between(index, flow, optimizer)
        losses.append(step(x))
        flags.append(step.graphed)
    got = snapshot(flow, optimizer, world.device)
    torch.manual_seed(3)
    for index, x in enumerate(batches):
        between(index, eager_flow, eager_optimizer)
        wanted.append(eager_step(eager_flow, eager_optimizer, x, **options))
    want = snapshot(eager_flow, eager_optimizer, world.device)
    world.assert_same(torch.stack(losses), torch.stack(wanted))
    for left, right in zip(got, want, strict=True):
        world.assert_same(left, right)
    assert not any(loss.requires_grad for loss in losses)
    return flags


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
