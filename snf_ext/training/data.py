"""The table of data sets that the commands train on; see docs/data.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .cifar10 import load_cifar10
from .dataset import SPLITS, Dataset
from .digits import load_digits
from .errors import UserError
from .image_file import load_images
from .imagenet32 import load_imagenet32
from .mnist import load_mnist
from .toy import DENSITIES, load_toy

__all__ = [
    "LOADERS",
    "SPLITS",
    "VERIFIED",
    "Dataset",
    "load",
    "load_cifar10",
    "load_digits",
    "load_imagenet32",
    "load_images",
    "load_mnist",
    "load_toy",
]

# Called with the folder (None if none was named) and whether labels are wanted.
LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "imagenet32": load_imagenet32,
    "images": load_images,
    **{name: partial(load_toy, name) for name in DENSITIES},
}

# Those whose files have known checksums; their loaders take ``verify``.
VERIFIED = ("mnist", "cifar10")


def load(
    name: str, data_dir: Path | None = None, labels: bool = False, verify: bool = True
) -> Dataset:
    """Load a data set by its name, a key of ``LOADERS``.

    Args:
        name: which.
        data_dir: where its files are, for those that are not built in: their folder, or one that
            holds it under its usual name.
        labels: read the classes too.
        verify: False takes files of the same form but another content, such as Fashion-MNIST for
            MNIST.

    Raises:
        UserError: the name is unknown, or the files cannot be used.
        FileNotFoundError: a file is missing.

    >>> digits = load("digits")
    >>> digits.event_shape, digits.pixel_levels, len(digits.train), len(digits.val)
    ((1, 8, 8), 17, 1197, 300)
    """
    if name not in LOADERS:
        raise UserError(f"data must be one of {', '.join(LOADERS)}; got {name!r}")
    if verify:
        return LOADERS[name](data_dir, labels)
    if name not in VERIFIED:
        raise UserError(
            f"--no-verify must be left out for {name}; data with checksums: {', '.join(VERIFIED)}"
        )
    return LOADERS[name](data_dir, labels, verify=False)
