"""A part of a batch that is treated as the part of it that it is: the same noise, the same sums.

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
from torch import Tensor


class Shard(NamedTuple):
    """Which samples of a batch are here: those from ``start`` on, of ``total``."""

    start: int
    total: int


class _Local(threading.local):
    shard: Shard | None = None


_local = _Local()


def current() -> Shard | None:
    """What :func:`sharded` has set; None where batches are whole."""
    return None if torch.compiler.is_compiling() else _local.shard


@contextmanager
def sharded(start: int, total: int) -> Iterator[None]:
    """A block in which batches hold the samples from ``start`` on, of ``total``."""
    before, _local.shard = _local.shard, Shard(start, total)
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
    >>> with sharded(3, 4):
    ...     torch.equal(drawn_for(x[3:], torch.rand_like), whole[3:])
    True
    """
    shard = current()
    if shard is None:
        return draw(x)
    return draw(x.new_empty((shard.total, *x.shape[1:])))[shard.start : shard.start + len(x)]
