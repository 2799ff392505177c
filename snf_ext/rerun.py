"""What it takes to run a module a second time as it ran the first: noise, state, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from . import passes, shard
from .bijection import Bijection


@dataclass
class FirstRun:
    """What is remembered of a module's run.

    Attributes:
        device: where it ran.
        kept: what it did to its state by :func:`snf_ext.passes.once`.
        noise: the states of the random generators before, if it drew from them.
        part: which part of a batch it ran on.
        buffers: that it may change other than by ``once``: those that it did change, and all of
            networks (torch's batch norm changes its own without counting up their version).
    """

    device: torch.device
    kept: passes.Kept = field(default_factory=dict)
    noise: list[Tensor] | None = None
    part: shard.Shard | None = None
    buffers: list[Tensor] = field(default_factory=list)

    @classmethod
    @contextmanager
    def watched(cls, module: nn.Module, device: torch.device) -> Iterator[FirstRun]:
        """A block that runs ``module``."""
        run = cls(device, part=shard.current())
        before = noise_of(device)
        versions = [
            (b, b._version if isinstance(owner, Bijection) else -1)
            for owner in module.modules()
            for b in owner.buffers(recurse=False)
        ]
        with passes.first(run.kept):
            yield run
        if not all(torch.equal(a, b) for a, b in zip(before, noise_of(device), strict=True)):
            run.noise = before
        run.buffers = [b for b, version in versions if b._version != version]

    @contextmanager
    def again(self) -> Iterator[None]:
        """A block that runs or undoes it with the same noise, and leaves generators and buffers."""
        values = [b.clone() for b in self.buffers]
        now = None if self.noise is None else noise_of(self.device)
        if self.noise is not None:
            set_noise(self.device, self.noise)
        try:
            with passes.again(self.kept), shard.sharded(self.part):
                yield
        finally:
            if now is not None:
                set_noise(self.device, now)
            with torch.no_grad():
                for buffer, value in zip(self.buffers, values, strict=True):
                    buffer.copy_(value)


def autocast_of_now(kind: str) -> Callable[[], torch.autocast]:
    """Makes blocks with the autocast that is on now, for a kind of device."""
    if not torch.amp.is_autocast_available(kind):
        return partial(torch.autocast, "cpu", enabled=False)
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled)


def noise_of(device: torch.device) -> list[Tensor]:
    """The states of the random generators that a module on ``device`` draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_noise(device: torch.device, states: list[Tensor]) -> None:
    """Put the generators into ``states``, from :func:`noise_of`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
