"""A set of events in three splits, checked, whole in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """Raw images or vectors in three splits, each ``(N, *event_shape)``.

    Attributes:
        name: what ``--data`` calls it.
        train, val, test: the splits; images uint8 as loaded, floating point is taken too.
        event_shape: ``(C, H, W)`` of one image, ``(D,)`` of one vector.
        pixel_levels: how many values a pixel can take, 0 .. pixel_levels - 1; None for continuous
            data. Bits per dimension count these and no more: 16-level images are not stretched to
            0..255, which would flatter the figure.
        train_labels, val_labels, test_labels: class of each image, ``(N,)`` int64; None where the
            labels were not asked for.
        classes: how many classes there are, 0 without labels.

    Raises:
        UserError: a split is empty, has another shape, or holds a value that is not finite or
            not within 0 .. pixel_levels - 1; labels that do not fit the images or the classes.

    Cost: one pass over the values, no copy.

    >>> images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    >>> Dataset("zeros", images, images, images, (1, 4, 4), 256).train.shape
    torch.Size([2, 1, 4, 4])
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    event_shape: tuple[int, ...]
    pixel_levels: int | None
    train_labels: Tensor | None = None
    val_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            self._check(split, getattr(self, split))
            self._check_labels(split, self.labels(split))

    def labels(self, split: str) -> Tensor | None:
        """The labels of ``"train"``, ``"val"`` or ``"test"``."""
        labels: Tensor | None = getattr(self, f"{split}_labels")
        return labels

    def _check(self, split: str, images: Tensor) -> None:
        what = f"{self.name}: {split} images"
        if images.dim() == 0 or tuple(images.shape[1:]) != self.event_shape:
            got = tuple(images.shape)
            raise UserError(f"{what} must have shape (N, *{self.event_shape}); got {got}")
        if not len(images):
            raise UserError(f"{what} must be at least one; got none")
        if images.is_floating_point() and not images.isfinite().all():
            first = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
            raise UserError(f"{what} must be finite; got nan or infinity in image {first}")
        if self.pixel_levels is None:
            return
        low, high = images.min().item(), images.max().item()
        if low < 0 or high > self.pixel_levels - 1:
            raise UserError(f"{what} must lie in 0..{self.pixel_levels - 1}; got {low}..{high}")

    def _check_labels(self, split: str, labels: Tensor | None) -> None:
        what = f"{self.name}: {split} labels"
        if (labels is None) != (self.classes == 0):
            raise UserError(f"{what} must be there exactly if there are classes")
        if labels is None:
            return
        count = len(getattr(self, split))
        if labels.dtype != torch.int64 or labels.shape != (count,):
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise UserError(f"{what} must be int64 of shape ({count},), one an image; got {got}")
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high > self.classes - 1:
            raise UserError(f"{what} must lie in 0..{self.classes - 1}; got {low}..{high}")

    def with_labels(self, labels: tuple[Tensor, ...], classes: int) -> Dataset:
        """The same images with the labels of the training, validation and test split."""
        train, val, test = labels
        return replace(self, train_labels=train, val_labels=val, test_labels=test, classes=classes)

    def limit_train(self, count: int | None) -> Dataset:
        """The same data with only the first ``count`` training images (None: all)."""
        if count is None:
            return self
        if not 1 <= count <= len(self.train):
            raise UserError(f"limit_train must lie in 1..{len(self.train)}; got {count}")
        labels = None if self.train_labels is None else self.train_labels[:count]
        return replace(self, train=self.train[:count], train_labels=labels)
