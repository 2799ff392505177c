"""The data sets that the commands train on, whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, require
from .idx import read_idx
from .npz import find_npz, images_of, labels_of, read_npz

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """Raw images in three splits, each ``(N, *event_shape)`` with values 0 .. pixel_levels - 1.

    Attributes:
        name: what ``--data`` calls it.
        train, val, test: the splits; uint8 as loaded, floating point is taken too.
        event_shape: ``(C, H, W)`` of one image.
        pixel_levels: how many values a pixel can take. Bits per dimension count these and no more:
            16-level images are not stretched to 0..255, which would flatter the figure.
        train_labels, val_labels, test_labels: class of each image, ``(N,)`` int64; None where the
            labels were not asked for.
        classes: how many classes there are, 0 without labels.

    Raises:
        UserError: a split is empty, has another shape, or holds a value that is not finite or
            not within 0 .. pixel_levels - 1; labels that do not fit the images or the classes.

    >>> images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    >>> Dataset("zeros", images, images, images, (1, 4, 4), 256).train.shape
    torch.Size([2, 1, 4, 4])
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    event_shape: tuple[int, int, int]
    pixel_levels: int
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


def load_digits(data_dir: Path | None = None, labels: bool = False) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 1x8x8, values 0..16.

    The values stay as they are: ``pixel_levels`` is 17, so bits/dim is an honest count for a pixel
    of 17 values (a uniform guess costs log2 17 = 4.09 bits/dim, not 8).

    The split is the same for every run and every seed: 1,197 training, 300 validation and 300
    test images.
    """
    require("sklearn")
    import numpy as np
    from sklearn.datasets import load_digits as bundled

    content = bundled()
    images = torch.from_numpy(content.images.astype(np.uint8))[:, None]
    # RandomState's stream is frozen for good; torch and numpy's Generator do not promise that.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    sizes = [len(images) - 600, 300, 300]
    train, val, test = images[order].split(sizes)
    digits = Dataset("digits", train, val, test, (1, 8, 8), 17)
    if not labels:
        return digits
    numbers = torch.from_numpy(content.target.astype(np.int64))[order]
    return digits.with_labels(numbers.split(sizes), 10)


def load_mnist(
    data_dir: Path | None,
    labels: bool = False,
    *,
    train: int = 50_000,
    val: int = 10_000,
    test: int = 10_000,
) -> Dataset:
    """MNIST from its IDX files, 1x28x28, values 0..255, in the paper's split.

    The first 50,000 images of the training file train, its last 10,000 validate, and the test
    file tests. The files are ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, and with
    ``labels`` also ``train-labels-idx1-ubyte`` and ``t10k-labels-idx1-ubyte``, each with or without
    ``.gz``.

    Args:
        data_dir: the folder that holds them.
        labels: read the labels too.
        train, val, test: how many images each split has.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        UserError: no folder was given, or a file is not what it must be (see :func:`read_idx`).
    """
    if data_dir is None:
        raise UserError("--data mnist needs --data-dir: the folder that holds the IDX files")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; --data-dir must be a folder")
    first = _idx(folder, "train-images-idx3-ubyte", train + val)[:, None]
    last = _idx(folder, "t10k-images-idx3-ubyte", test)[:, None]
    mnist = Dataset("mnist", first[:train], first[train:], last, (1, 28, 28), 256)
    if not labels:
        return mnist
    known = _idx(folder, "train-labels-idx1-ubyte", train + val, ()).long()
    asked = _idx(folder, "t10k-labels-idx1-ubyte", test, ()).long()
    return mnist.with_labels((known[:train], known[train:], asked), 10)


def _idx(folder: Path, name: str, count: int, event_shape: tuple[int, ...] = (28, 28)) -> Tensor:
    candidates = [folder / name, folder / f"{name}.gz"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        needed = "" if event_shape else "; a conditional flow needs the labels"
        raise FileNotFoundError(
            f"{candidates[0]} does not exist, nor does {name}.gz beside it{needed}"
        )
    content = read_idx(path, event_shape)
    if len(content) != count:
        what = "images" if event_shape else "labels"
        raise UserError(f"{path} must hold {count} {what}; got {len(content)}")
    return content


def load_images(data_dir: Path | None, labels: bool = False, *, val: int = 1000) -> Dataset:
    """Images of any size from an ``.npz`` file, values 0..255.

    The file holds ``train_x`` and ``test_x``, ``(N, H, W, C)`` uint8 with C 1 or 3, and for a
    conditional flow ``train_y`` and ``test_y``, ``(N,)`` integers from 0. The last 1,000 training
    images validate.

    Args:
        data_dir: the file, or a folder that holds no other ``.npz`` file.
        labels: read the labels too.
        val: how many images validate.

    Raises:
        FileNotFoundError: the file is missing.
        UserError: none was given, or it is not what it must be.
    """
    if data_dir is None:
        raise UserError("--data images needs --data-dir: the .npz file of images, or its folder")
    path = find_npz(data_dir)
    names = ("train_x", "test_x") + (("train_y", "test_y") if labels else ())
    arrays = read_npz(path, names)
    first, last = (images_of(path, name, arrays[name]) for name in names[:2])
    if len(first) <= val:
        raise UserError(
            f"{path}: train_x must hold more than the {val} images that validate; got {len(first)}"
        )
    channels, height, width = first.shape[1:]
    shape, train = (channels, height, width), len(first) - val
    images = Dataset("images", first[:train], first[train:], last, shape, 256)
    if not labels:
        return images
    known = labels_of(path, "train_y", arrays["train_y"], len(first))
    asked = labels_of(path, "test_y", arrays["test_y"], len(last))
    classes = 1 + max(int(known.max()), int(asked.max()))
    if classes > len(known):
        raise UserError(f"{path}: labels must number the classes from 0; got {classes - 1}")
    return images.with_labels((known[:train], known[train:], asked), classes)


LOADERS: dict[str, Callable[[Path | None, bool], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "images": load_images,
}


def load(name: str, data_dir: Path | None = None, labels: bool = False) -> Dataset:
    """Load a data set by its name, a key of ``LOADERS``; ``labels`` reads the classes too.

    Raises:
        UserError: the name is unknown, or the files cannot be used.
        FileNotFoundError: a file is missing.

    >>> digits = load("digits")
    >>> digits.event_shape, digits.pixel_levels, len(digits.train), len(digits.val)
    ((1, 8, 8), 17, 1197, 300)
    """
    if name not in LOADERS:
        raise UserError(f"data must be one of {', '.join(LOADERS)}; got {name!r}")
    return LOADERS[name](data_dir, labels)
