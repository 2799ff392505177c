"""The processes that train together, as ``torchrun`` starts them; or the one that trains alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """What one of the processes knows of all of them.

    Attributes:
        rank: its number, from 0; the first one writes the files.
        size: how many there are.
        device: where sums over processes are made.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.size == 1:
            return value.cpu()
        total = value.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def first_of(self, value: _T | None) -> _T | None:
        """The value of the first process that has one."""
        if self.size == 1:
            return value
        values: list[_T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def from_first(self, act: Callable[[], _T]) -> _T:
        """What ``act`` gives on the first process, where alone it runs; or the error it raises."""
        if self.size == 1:
            return act()
        outcome: list[object] = [None, None]
        if self.first:
            try:
                outcome[0] = act()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]  # type: ignore[misc]
        return outcome[0]  # type: ignore[return-value]


ALONE = World()


def started_by_torchrun() -> bool:
    """Whether this process is one of several (or of one) that ``torchrun`` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this process speaks for all; before and after :func:`joined` too."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def is_restarted() -> bool:
    """Whether ``torchrun`` has started the processes again, after one of them was lost."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where ``torchrun`` started one for each; else ``device``.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or one of them was named.
    """
    if device.type != "cuda" or not started_by_torchrun():
        return device
    if int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if str(device) != "cuda":
        raise UserError(f"device must be cuda, without a number, under torchrun; got {device}")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"nproc-per-node must be at most the {there} GPUs of a machine; got more: start fewer "
            "processes, or train on --device cpu"
        )
    return torch.device("cuda", number)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """A block in which the processes that ``torchrun`` started know of each other.

    By NCCL on GPUs, by gloo on CPUs. Without ``torchrun``, or with one process, there is nothing
    to do, and the world is of one.

    >>> with joined(torch.device("cpu")) as world:
    ...     world.size, world.first
    (1, True)
    """
    if not started_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise UserError("torch must be built with distributed to train in several processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    # After a restart the store still has the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {_restarts()}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
