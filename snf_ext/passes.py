"""Passes through bijections that are run twice: how they are run, and what is done only once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

Kept = dict[object, Any]


class _Local(threading.local):
    """Each thread's own: on a GPU backward runs in another one."""

    run: Callable[..., Any] | None = None  # through several bijections; None: one after the other
    kept: Kept | None = None  # what `once` gave in the pass that is run
    again = False  # whether it is run a second time


_local = _Local()


def once(owner: object, act: Callable[[], _T]) -> _T:
    """``act()``; where the pass is run again, what it gave the first time, and nothing is done.

    For what a layer does to its state in a training pass: reversible training runs each bijection
    a second time in backward. ``owner`` is the layer, which does so once in a pass.

    Raises:
        RuntimeError: the layer is a replica of ``nn.DataParallel``, whose state is thrown away.

    >>> count, kept = [], {}
    >>> with first(kept):
    ...     once("layer", lambda: len(count) or count.append(1) or "done")
    'done'
    >>> with again(kept):
    ...     once("layer", lambda: count.append(1))
    'done'
    >>> count
    [1]
    """
    if torch.compiler.is_compiling():
        return act()
    if getattr(owner, "_is_replica", False):
        raise RuntimeError(
            f"{type(owner).__name__} changes its state in a pass; nn.DataParallel throws its "
            "replicas away; use DistributedDataParallel, or start ActNorm by initialize()"
        )
    if _local.kept is None:
        return act()
    if not _local.again:
        _local.kept[owner] = act()
    return _local.kept.get(owner)  # type: ignore[return-value]


def recalled(owner: object) -> Any:
    """What ``once`` gave the first time, in a pass that is run or undone again; else None."""
    return _local.kept.get(owner) if _local.again and _local.kept is not None else None


@contextmanager
def first(kept: Kept) -> Iterator[None]:
    """A block that runs a bijection the first time, and fills ``kept``."""
    with _set(run=None, kept=kept, again=False):
        yield


@contextmanager
def again(kept: Kept) -> Iterator[None]:
    """A block that runs or undoes a bijection again, with what the first time filled in."""
    with _set(run=None, kept=kept, again=True):
        yield


@contextmanager
def run_by(run: Callable[..., Any]) -> Iterator[None]:
    """A block in which :func:`snf_ext.bijection.push` leaves its work to ``run``."""
    with _set(run=run):
        yield


def runner() -> Callable[..., Any] | None:
    """What :func:`run_by` has set."""
    return None if torch.compiler.is_compiling() else _local.run


@contextmanager
def _set(**values: Any) -> Iterator[None]:
    before = {name: getattr(_local, name) for name in values}
    _local.__dict__.update(values)
    try:
        yield
    finally:
        _local.__dict__.update(before)
