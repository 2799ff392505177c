"""How many bytes of tensors are alive at once while something runs, and what it leaves alive.

Counted below autograd, operator by operator, in forward and backward: the storages that operators
make, from when they are there until nobody has them any more. What was there before (parameters,
the batch) is not counted, nor what an operator takes and gives back inside its own kernel. For that
see the peak of a whole process in ``bench.memory``. On CUDA the caching allocator counts, kernels'
own memory included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Bytes", "watch"]


class Bytes:
    """Bytes of tensors made since, ``now`` and at the ``peak``."""

    now = 0
    peak = 0


class _Counting(TorchDispatchMode):
    def __init__(self, bytes_: Bytes) -> None:
        super().__init__()
        self.bytes = bytes_
        # By address, which a weak reference keeps from being used again.
        self._before: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for key, storage in _storages((args, kwargs)):
            if key not in self._made and key not in self._before:
                self._before[key] = StorageWeakRef(storage)
        result = func(*args, **kwargs)
        for key, storage in _storages(result):
            if key not in self._made and key not in self._before:
                self._made[key] = (StorageWeakRef(storage), storage.nbytes())
                self.bytes.now += storage.nbytes()
        self.count()
        return result

    def count(self) -> None:
        for key in [key for key, (ref, _) in self._made.items() if ref.expired()]:
            self.bytes.now -= self._made.pop(key)[1]
        self.bytes.peak = max(self.bytes.peak, self.bytes.now)


def _storages(tree: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            yield storage._cdata, storage


class _Cuda:
    """The same from CUDA's caching allocator."""

    def __init__(self, bytes_: Bytes, device: torch.device) -> None:
        self.bytes, self.device = bytes_, device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.start = torch.cuda.memory_allocated(device)

    def count(self) -> None:
        torch.cuda.synchronize(self.device)
        self.bytes.now = torch.cuda.memory_allocated(self.device) - self.start
        self.bytes.peak = torch.cuda.max_memory_allocated(self.device) - self.start


@contextmanager
def watch(device: torch.device | str = "cpu") -> Iterator[Callable[[], Bytes]]:
    """A block, and what counts its bytes when asked, inside or after it.

    >>> x = torch.ones(1000)
    >>> with watch() as counted:
    ...     y = (x + 1).square().sum()
    ...     saved = counted().now
    >>> saved, counted().peak  # the sum; x + 1 and its square
    (4, 8000)
    """
    found = Bytes()
    if torch.device(device).type == "cuda":
        allocator = _Cuda(found, torch.device(device))
        yield lambda: _asked(allocator, found)
        return
    with _Counting(found) as mode:
        yield lambda: _asked(mode, found)


def _asked(counter: _Counting | _Cuda, found: Bytes) -> Bytes:
    counter.count()
    return found
