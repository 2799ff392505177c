"""The data sets that the commands train on, whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, require
from .idx import read_idx


@dataclass(frozen=True)
class Dataset:
    """Raw images in three splits, each ``(N, *event_shape)`` with values 0 .. levels - 1.

    Attributes:
        name: what ``--data`` calls it.
        train, val, test: the splits; uint8 as loaded, floating point is taken too.
        event_shape: ``(C, H, W)`` of one image.
        levels: how many values a pixel can take. Bits per dimension count these and no more:
            16-level images are not stretched to 0..255, which would flatter the figure.

    Raises:
        UserError: a split is empty, has another shape, or holds a value that is not finite or
            not within 0 .. levels - 1.

    >>> images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    >>> Dataset("zeros", images, images, images, (1, 4, 4), 256).train.shape
    torch.Size([2, 1, 4, 4])
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    event_shape: tuple[int, int, int]
    levels: int

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            self._check(split, getattr(self, split))

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
        if low < 0 or high > self.levels - 1:
            raise UserError(f"{what} must lie in 0..{self.levels - 1}; got {low}..{high}")

    def limit_train(self, count: int | None) -> Dataset:
        """The same data with only the first ``count`` training images (None: all)."""
        if count is None:
            return self
        if not 1 <= count <= len(self.train):
            raise UserError(f"limit_train must lie in 1..{len(self.train)}; got {count}")
        train = self.train[:count]
        return Dataset(self.name, train, self.val, self.test, self.event_shape, self.levels)


def load_digits(data_dir: Path | None = None) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 1x8x8, values 0..16.

    The values stay as they are: ``levels`` is 17, so bits/dim is an honest count for a pixel of
    17 values (a uniform guess costs log2 17 = 4.09 bits/dim, not 8).

    The split is the same for every run and every seed: 1,197 training, 300 validation and 300
    test images.
    """
    require("sklearn")
    import numpy as np
    from sklearn.datasets import load_digits as bundled

    images = torch.from_numpy(bundled().images.astype(np.uint8))[:, None]
    # RandomState's stream is frozen for good; torch and numpy's Generator do not promise that.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    train, val, test = images[order].split([len(images) - 600, 300, 300])
    return Dataset("digits", train, val, test, (1, 8, 8), 17)


def load_mnist(
    data_dir: Path | None, train: int = 50_000, val: int = 10_000, test: int = 10_000
) -> Dataset:
    """MNIST from its IDX files, 1x28x28, values 0..255, in the paper's split.

    The first 50,000 images of the training file train, its last 10,000 validate, and the test
    file tests. The files are ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, each with
    or without ``.gz``; labels are not needed.

    Args:
        data_dir: the folder that holds them.
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
    first = _images(folder, "train-images-idx3-ubyte", train + val)
    return Dataset(
        "mnist",
        train=first[:train],
        val=first[train:],
        test=_images(folder, "t10k-images-idx3-ubyte", test),
        event_shape=(1, 28, 28),
        levels=256,
    )


def _images(folder: Path, name: str, count: int) -> Tensor:
    candidates = [folder / name, folder / f"{name}.gz"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{candidates[0]} does not exist, nor does {name}.gz beside it")
    images = read_idx(path)
    if len(images) != count:
        raise UserError(f"{path} must hold {count} images; got {len(images)}")
    return images[:, None]


LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set by its name, a key of ``LOADERS``.

    Raises:
        UserError: the name is unknown, or the files cannot be used.
        FileNotFoundError: a file is missing.

    >>> digits = load("digits")
    >>> digits.event_shape, digits.levels, len(digits.train), len(digits.val), len(digits.test)
    ((1, 8, 8), 17, 1197, 300, 300)
    """
    if name not in LOADERS:
        raise UserError(f"data must be one of {', '.join(LOADERS)}; got {name!r}")
    return LOADERS[name](data_dir)
