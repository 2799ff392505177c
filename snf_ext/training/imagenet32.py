"""ImageNet at 32x32 pixels from its npz batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset
from .errors import UserError
from .folders import folder_of, root
from .npz import labels_of, read_npz

SHAPE = (3, 32, 32)
VALUES = 3 * 32 * 32
CLASSES = 1000
TRAIN = tuple(f"train_data_batch_{number}.npz" for number in range(1, 11))
TEST = "val_data.npz"
# Train and test come in folders of their own.
USUAL_TRAIN = ("Imagenet32_train_npz", "Imagenet32_train", "imagenet32")
USUAL_TEST = ("Imagenet32_val_npz", "Imagenet32_val", "imagenet32")


def load_imagenet32(
    data_dir: Path | None,
    labels: bool = False,
    *,
    train: int = 1_261_167,
    val: int = 20_000,
    test: int = 50_000,
) -> Dataset:
    """ImageNet 32x32 from its npz batches, 3x32x32, values 0..255.

    Of the images in ``train_data_batch_1.npz`` .. ``train_data_batch_10.npz`` a random 20,000,
    always the same, validate and the rest trains; ``val_data.npz`` tests. Each file holds ``data``
    ``(N, 3072)`` uint8, channel by channel, and ``labels`` ``(N,)``, 1..1000.

    These are the 1,281,167 images of Chrabaszcz et al. 2017. SNF had 1,281,149, made smaller in
    another way by van den Oord et al. 2016 and no longer offered: bits/dim of the one cannot be
    compared with those of the other.

    Args:
        data_dir: the folder that holds the files, or one that holds those of the folders
            ``Imagenet32_train_npz`` and ``Imagenet32_val_npz``.
        labels: read the labels too; classes are 0..999.
        train, val, test: how many images each split has.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        UserError: no folder was given, a file is not what it must be (see :func:`read_npz`), or
            there are more or fewer images.

    Cost: 4.1 GB for the images, and one file of 0.4 GB at a time beside them.
    Source: SNF A.3.
    """
    where = root("imagenet32", data_dir, "the folder that holds the npz batches")
    batches = [folder_of(where, TRAIN, USUAL_TRAIN) / name for name in TRAIN]
    tests = [folder_of(where, (TEST,), USUAL_TEST) / TEST]
    for path in (*batches, *tests):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; the {len(TRAIN)} batches of ImageNet 32x32 and "
                f"{TEST} must be there"
            )
    # RandomState's stream is frozen for good.
    validates = torch.zeros(train + val, dtype=torch.bool)
    validates[torch.from_numpy(np.random.RandomState(0).permutation(train + val)[:val])] = True
    (fit, check), known = _read(batches, [~validates, validates], labels)
    (last,), asked = _read(tests, [torch.ones(test, dtype=torch.bool)], labels)
    images = Dataset("imagenet32", fit, check, last, SHAPE, 256)
    return images.with_labels((*known, *asked), CLASSES) if labels else images


def _read(
    paths: list[Path], splits: list[Tensor], labels: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Images and labels of each split, a mask over the images of all files together."""
    total, counts = len(splits[0]), [int(split.sum()) for split in splits]
    images = [torch.empty(count, *SHAPE, dtype=torch.uint8) for count in counts]
    classes = [torch.empty(count, dtype=torch.int64) for count in counts if labels]
    begin, filled = 0, [0] * len(splits)
    for path in paths:
        data, known = _batch(path, labels)
        end = begin + len(data)
        if end > total:
            break
        for number, split in enumerate(splits):
            rows = split[begin:end].nonzero()[:, 0]
            part = slice(filled[number], filled[number] + len(rows))
            torch.index_select(data, 0, rows, out=images[number][part])
            if known is not None:
                classes[number][part] = known[rows]
            filled[number] = part.stop
        begin = end
    if end != total:
        which = f"{paths[0]}" + f" .. {paths[-1].name}" * (len(paths) > 1)
        got = f"{end}" + " or more" * (end > total)
        raise UserError(f"{which} must hold {total} images; got {got}")
    return images, classes


def _batch(path: Path, labels: bool) -> tuple[Tensor, Tensor | None]:
    arrays = read_npz(path, ("data", "labels") if labels else ("data",))
    data = arrays["data"]
    if data.dtype != "uint8" or data.ndim != 2 or data.shape[1] != VALUES or not len(data):
        raise UserError(
            f"{path}: data must be uint8 of shape (N, {VALUES}), N at least 1; "
            f"got {data.dtype} of shape {data.shape}"
        )
    images = torch.from_numpy(data).view(-1, *SHAPE)
    if not labels:
        return images, None
    known = labels_of(path, "labels", arrays["labels"], len(data))
    low, high = int(known.min()), int(known.max())
    if low < 1 or high > CLASSES:
        raise UserError(f"{path}: labels must lie in 1..{CLASSES}; got {low}..{high}")
    return images, known - 1
