"""Batches by slicing a set that is whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from .seeds import derive_seed


class Batch(NamedTuple):
    """Some images and, for a conditional flow, the context of each; else None."""

    images: Tensor
    context: Tensor | None


class Batches:
    """The batches of one epoch; the order depends on the seed and the epoch alone.

    Args:
        images: ``(N, ...)``, on the device where they will be used.
        batch_size: images a batch; the last has what is left.
        seed: of the order.
        shuffle: False keeps the order of ``images``.
        context: ``(N, ...)``, travels with the images.

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
    ) -> None:
        self.images, self.context = images, context
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.resident = True

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def order(self, number: int) -> Tensor:
        """The places ``(N,)`` of the images in the order of epoch ``number``, on their device."""
        if not self.shuffle:
            return torch.arange(len(self.images), device=self.images.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)

    def take(self, index: Tensor) -> Batch:
        """The images at these places."""
        return Batch(self.images[index], None if self.context is None else self.context[index])

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch ``number``."""
        for index in self.order(number).split(self.batch_size):
            yield self.take(index)

    def stream(self, first: int) -> Iterator[Batch]:
        """The batches of epoch ``first`` and of all that follow, without end."""
        for number in count(first):
            yield from self.epoch(number)


def split(images: Tensor, context: Tensor | None, size: int) -> Iterator[Batch]:
    """Images and their context in order, ``size`` at a time."""
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield Batch(images[part], None if context is None else context[part])
