"""Images of any size from one ``.npz`` file."""

from __future__ import annotations

from pathlib import Path

from .dataset import Dataset
from .errors import UserError
from .npz import find_npz, images_of, labels_of, read_npz


def load_images(data_dir: Path | None, labels: bool = False, *, val: int = 1000) -> Dataset:
    """Images of any size from an ``.npz`` file, values 0..255.

    The file holds ``train_x`` and ``test_x``, ``(N, H, W, C)`` uint8 with C 1 or 3, and for a
    conditional flow ``train_y`` and ``test_y``, ``(N,)`` integers from 0. The last 1,000 training
    images validate.

    Args:
        data_dir: the file, or a folder that holds no other ``.npz`` file, itself or in its folder
            ``images``.
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
