"""MNIST, and what else comes as IDX files of 28x28 images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .dataset import Dataset
from .errors import UserError
from .folders import folder_of, require_md5, root
from .idx import header, read_idx

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
TRAIN_LABELS, TEST_LABELS = "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"
USUAL = ("mnist", "MNIST", "MNIST/raw")

# Of the uncompressed files: whoever packs them again changes those of the packed ones.
MD5 = {
    TRAIN: "6bbc9ace898e44ae57da46a324031adb",
    TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
    TEST: "2646ac647ad5339dbf082846283269ea",
    TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist(
    data_dir: Path | None,
    labels: bool = False,
    *,
    verify: bool = True,
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
        data_dir: the folder that holds them, or one that holds it as ``mnist``.
        labels: read the labels too.
        verify: require MNIST itself, by checksums.
        train, val, test: how many images each split has.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        UserError: no folder was given, or a file is not what it must be (see :func:`read_idx`).

    Source: SNF A.3.
    """
    where = root("mnist", data_dir, "the folder that holds the IDX files")
    folder = folder_of(where, [n + end for n in (TRAIN, TEST) for end in ("", ".gz")], USUAL)
    first = _idx(folder, TRAIN, train + val, verify)[:, None]
    last = _idx(folder, TEST, test, verify)[:, None]
    mnist = Dataset("mnist", first[:train], first[train:], last, (1, 28, 28), 256)
    if not labels:
        return mnist
    known = _idx(folder, TRAIN_LABELS, train + val, verify, ()).long()
    asked = _idx(folder, TEST_LABELS, test, verify, ()).long()
    return mnist.with_labels((known[:train], known[train:], asked), 10)


def _idx(
    folder: Path, name: str, count: int, check: bool, event_shape: tuple[int, ...] = (28, 28)
) -> Tensor:
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
    if check:
        require_md5(path, (header(content), content.numpy()), MD5[name], "MNIST")
    return content
