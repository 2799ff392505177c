"""Batches of a set that is whole in memory, on the device where it fits there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from .augment import AUGMENTATIONS
from .seeds import derive_seed


class Batch(NamedTuple):
    """Some images and, for a conditional flow, the context of each; else None."""

    images: Tensor
    context: Tensor | None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for the CPU, where the images are already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Batches:
    """The batches of one epoch; the order depends on the seed and the epoch alone.

    The set is moved to the device whole if it takes at most half of the memory that is free there.
    Else it stays where it is: a thread gathers the next batch in pinned memory while the device
    works on this one, and the copy does not wait.

    Args:
        images: ``(N, ...)``.
        batch_size: images a batch; the last has what is left.
        seed: of the order.
        shuffle: False keeps the order of ``images``.
        context: ``(N, ...)``, travels with the images.
        device: where batches are used; that of ``images`` if None.
        augment: a key of ``AUGMENTATIONS``, what happens to the images of each batch, by numbers of
            torch's generator at the moment when the batch is taken; None for nothing.
        free: how many bytes are free on a device, None for no limit.

    Attributes:
        images, context: the set, where it lies.
        resident: whether that is the device.

    >>> batches = Batches(torch.arange(5), 2, seed=0, shuffle=False)
    >>> [batch.images.tolist() for batch in batches.epoch(1)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool,
        context: Tensor | None = None,
        *,
        device: torch.device | None = None,
        augment: str | None = None,
        free: Callable[[torch.device], int | None] = free_memory,
    ) -> None:
        self.device = images.device if device is None else torch.device(device)
        size = sum(_bytes(part) for part in (images, context) if part is not None)
        limit = None if device is None or images.is_cuda else free(self.device)
        self.resident = limit is None or 2 * size <= limit
        self.images = images.to(self.device) if self.resident else images
        self.context = None if context is None else context.to(self.images.device)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = None if augment is None else AUGMENTATIONS[augment]

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def order(self, number: int) -> Tensor:
        """The order of epoch ``number``: indices ``(N,)`` int64, where the images lie."""
        if not self.shuffle:
            return torch.arange(len(self.images), device=self.images.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
        order = torch.randperm(len(self.images), generator=generator)
        return order.to(self.images.device)

    def take(self, index: Tensor) -> Batch:
        """The images of ``index``, a part of :meth:`order`, on the device and augmented."""
        return self._finished(self._gathered(index))

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch ``number``."""
        parts = self.order(number).split(self.batch_size)
        if self.resident:
            yield from map(self.take, parts)
            return
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._gathered, parts[0])
            for part in parts[1:]:
                batch, ahead = ahead.result(), thread.submit(self._gathered, part)
                yield self._finished(batch)
            yield self._finished(ahead.result())

    def stream(self, first: int) -> Iterator[Batch]:
        """The batches of epoch ``first`` and of all that follow, without end."""
        for number in count(first):
            yield from self.epoch(number)

    def _gathered(self, index: Tensor) -> Batch:
        """Pinned if it has to travel: torch keeps such memory until its copy is done."""

        def rows(x: Tensor) -> Tensor:
            if self.resident:
                return x.index_select(0, index)
            pin = self.device.type == "cuda"
            part = torch.empty(len(index), *x.shape[1:], dtype=x.dtype, pin_memory=pin)
            return torch.index_select(x, 0, index, out=part)

        return Batch(rows(self.images), None if self.context is None else rows(self.context))

    def _finished(self, batch: Batch) -> Batch:
        images, context = batch.images.to(self.device, non_blocking=True), batch.context
        if context is not None:
            context = context.to(self.device, non_blocking=True)
        return Batch(images if self.augment is None else self.augment(images), context)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def split(images: Tensor, context: Tensor | None, size: int) -> Iterator[Batch]:
    """Images and their context in order, ``size`` at a time."""
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield Batch(images[part], None if context is None else context[part])
