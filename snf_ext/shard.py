"""A part of a batch that is treated as the part of it that it is: the same noise, the same samples.

Where a batch is split over processes or over time, every part runs under :func:`sharded`, and with
the random generators in the state in which the whole batch would have met them. What is drawn for
each sample is then what the whole batch would have drawn, and the generators end where they would
have ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """Which samples of a batch are here.

    Attributes:
        start: the first of them.
        total: how many the batch has.
        beside: ``(start, stop)`` of what each process holds at the same time, in their order; empty
            if there is one process.
        first: whether no other part of the batch came before on this process.
    """

    start: int
    total: int
    beside: tuple[tuple[int, int], ...] = ()
    first: bool = True


class _Local(threading.local):
    shard: Shard | None = None


_local = _Local()


def current() -> Shard | None:
    """What :func:`sharded` has set; None where batches are whole."""
    return None if torch.compiler.is_compiling() else _local.shard


@contextmanager
def sharded(shard: Shard | None) -> Iterator[None]:
    """A block in which batches are this part of a whole; None: whole ones."""
    before, _local.shard = _local.shard, shard
    try:
        yield
    finally:
        _local.shard = before


def drawn_for(x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """``draw(x)``, random numbers in the shape of x; of a shard, its part of the whole batch's.

    Shapes: x ``(B, ...)``, and so what comes back. Cost: in a shard that of the whole batch.

    >>> x = torch.zeros(4, 2)
    >>> _ = torch.manual_seed(0)
    >>> whole = drawn_for(x, torch.rand_like)
    >>> _ = torch.manual_seed(0)
    >>> with sharded(Shard(start=3, total=4)):
    ...     torch.equal(drawn_for(x[3:], torch.rand_like), whole[3:])
    True
    """
    shard = current()
    if shard is None:
        return draw(x)
    return draw(x.new_empty((shard.total, *x.shape[1:])))[shard.start : shard.start + len(x)]


def leading(x: Tensor, count: int) -> Tensor:
    """The first ``count`` samples of the batch, or what there is, the same on all processes.

    Of those samples that some process holds at the time. Cost: where there are several, one
    ``all_reduce`` of the result.

    >>> leading(torch.arange(5.0), 3)
    tensor([0., 1., 2.])
    """
    shard = current()
    if shard is None or len(shard.beside) < 2:
        return x[:count]
    before = sum(stop - start for start, stop in shard.beside if start < shard.start)
    held = sum(stop - start for start, stop in shard.beside)
    found = x.new_zeros((min(count, held), *x.shape[1:]))
    own = x[: max(0, len(found) - before)]
    found[before : before + len(own)] = own
    dist.all_reduce(found)
    return found
