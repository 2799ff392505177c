"""CIFAR-10 from its binary version; the pickled one is never read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .dataset import Dataset
from .errors import UserError
from .folders import folder_of, require_md5, root

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue, each row by row
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
USUAL = ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10")
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def load_cifar10(
    data_dir: Path | None,
    labels: bool = False,
    *,
    verify: bool = True,
    train: int = 40_000,
    val: int = 10_000,
    test: int = 10_000,
) -> Dataset:
    """CIFAR-10 from its binary version, 3x32x32, values 0..255, in the paper's split.

    The first 40,000 of the training images train, the last 10,000 validate, and ``test_batch.bin``
    tests. Five files ``data_batch_1.bin`` .. ``data_batch_5.bin`` hold a fifth of the training
    images each; a record is a byte of the label and 3,072 of the image, channel by channel.

    Args:
        data_dir: the folder that holds them, or one that holds it as ``cifar-10-batches-bin``.
        labels: keep the labels too.
        verify: require CIFAR-10 itself, by checksums.
        train, val, test: how many images each split has; train + val a multiple of 5.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        UserError: no folder was given, a file has another size or checksum, or a label is not
            within 0..9.

    Source: SNF A.3.
    """
    what = "the folder that holds data_batch_1.bin .. data_batch_5.bin and test_batch.bin"
    where = root("cifar10", data_dir, what)
    folder = folder_of(where, (*TRAIN, TEST), USUAL)
    counts = dict.fromkeys(TRAIN, (train + val) // len(TRAIN)) | {TEST: test}
    for name, count in counts.items():
        _check_size(folder / name, count)
    first, known = _read(folder, {name: counts[name] for name in TRAIN}, verify)
    last, asked = _read(folder, {TEST: test}, verify)
    cifar10 = Dataset("cifar10", first[:train], first[train:], last, SHAPE, 256)
    return cifar10.with_labels((known[:train], known[train:], asked), 10) if labels else cifar10


def _check_size(path: Path, count: int) -> None:
    if not path.is_file():
        pickled = path.with_suffix("").is_file()
        found = f"; {path.stem} there is of the pickled version, which is never read" * pickled
        raise FileNotFoundError(
            f"{path} does not exist; it must be there, of the binary version of CIFAR-10{found}"
        )
    size = path.stat().st_size
    if size != count * RECORD:
        raise UserError(
            f"{path} must hold {count} records of {RECORD} bytes, {count * RECORD} in all; "
            f"got {size}"
        )


def _read(folder: Path, counts: dict[str, int], check: bool) -> tuple[Tensor, Tensor]:
    total = sum(counts.values())
    images, labels = torch.empty(total, *SHAPE, dtype=torch.uint8), torch.empty(total).long()
    start = 0
    for name, count in counts.items():
        path, part = folder / name, slice(start, start + count)
        content = bytearray(path.read_bytes())
        if len(content) != count * RECORD:
            raise UserError(f"{path} must stay as it is while it is read; got another size")
        records = torch.frombuffer(content, dtype=torch.uint8).view(count, RECORD)
        images[part], labels[part] = records[:, 1:].view(count, *SHAPE), records[:, 0].long()
        if int(labels[part].max()) > 9:
            got = f"{int(labels[part].min())}..{int(labels[part].max())}"
            raise UserError(f"{path}: labels must lie in 0..9; got {got}")
        if check:
            require_md5(path, (content,), MD5[name], "CIFAR-10")
        start += count
    return images, labels
