#!/usr/bin/env python
"""Fuzzes the readers of data sets: any bytes are images or a :class:`UserError`.

    PYTHONPATH=.:tests python tests/fuzz/fuzz_data.py CORPUS

The first byte of an input chooses one of ``TARGETS``, the others are one file of a data set whose
other files are whole. Where a checksum would stop every change, the input is what it protects:
the content of a gzip file, or of one array in an archive.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from data_files import CIFAR10_BATCHES, idx, write_cifar10, write_imagenet32
from harness import chosen, run, scratch

from snf_ext.training import data

INSTRUMENTED = ["snf_ext.training", "numpy.lib._format_impl", "zipfile", "gzip"]

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
ROWS = torch.arange(6, dtype=torch.uint8)


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, 28, 28, dtype=torch.uint8)


def arrays() -> dict[str, np.ndarray]:
    return {
        "train_x": np.zeros((3, 2, 2, 3), np.uint8),
        "test_x": np.zeros((2, 2, 2, 3), np.uint8),
        "train_y": np.array([0, 1, 2]),
        "test_y": np.array([2, 0]),
    }


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, compression)
    return stream.getvalue()


def archive(**changed: bytes) -> bytes:
    packed = {name: npy(array) for name, array in arrays().items()}
    return npz(packed | changed, zipfile.ZIP_DEFLATED)


# ---- data sets of few images, whole but for the file that is fuzzed


@cache
def mnist() -> Path:
    folder = scratch() / "mnist"
    folder.mkdir()
    (folder / TRAIN).write_bytes(idx(zeros(4)))
    (folder / TEST).write_bytes(idx(zeros(2)))
    (folder / LABELS).write_bytes(idx(ROWS[:4], 0x0801))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(ROWS[:2], 0x0801))
    return folder


@cache
def imagenet32() -> Path:
    folder = scratch() / "imagenet32"
    write_imagenet32(folder, folder, [1] * 10, 2)
    return folder


@cache
def cifar10() -> Path:
    folder = scratch() / "cifar10"
    write_cifar10(folder, dict.fromkeys(CIFAR10_BATCHES, 1) | {"test_batch": 1})
    return folder


def mnist_with(name: str, content: bytes) -> None:
    path = mnist() / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        data.load_mnist(mnist(), True, verify=False, train=3, val=1, test=2)
    finally:
        path.write_bytes(before)


def cifar10_with(content: bytes) -> None:
    (cifar10() / "data_batch_3.bin").write_bytes(content)
    data.load_cifar10(cifar10(), True, verify=False, train=4, val=1, test=1)


def imagenet32_with(content: bytes) -> None:
    (imagenet32() / "train_data_batch_4.npz").write_bytes(content)
    data.load_imagenet32(imagenet32(), True, train=8, val=2, test=2)


def images(content: bytes) -> None:
    path = scratch() / "images.npz"
    path.write_bytes(content)
    data.load_images(path, True, val=1)


def batch(values: bytes | None = None, labels: bytes | None = None) -> bytes:
    return npz(
        {
            "data": values or npy(np.zeros((1, 3072), np.uint8)),
            "labels": labels or npy(np.array([7])),
        },
        zipfile.ZIP_DEFLATED,
    )


TARGETS: dict[str, Callable[[bytes], None]] = {
    "idx": lambda content: mnist_with(TRAIN, content),
    "idx-labels": lambda content: mnist_with(LABELS, content),
    "idx-gz": lambda content: mnist_with(TRAIN, gzip.compress(content, 1)),
    "cifar10": cifar10_with,
    "imagenet32": imagenet32_with,
    "imagenet32-data": lambda content: imagenet32_with(batch(values=content)),
    "imagenet32-labels": lambda content: imagenet32_with(batch(labels=content)),
    "images": images,
    "images-x": lambda content: images(archive(train_x=content)),
    "images-y": lambda content: images(archive(train_y=content)),
}


def one_input(content: bytes) -> None:
    chosen(content, TARGETS)


def seeds() -> dict[str, bytes]:
    """Whole files, and what has broken readers of such files before."""
    huge = header((10**12, 2, 2, 3)) + bytes(12)
    # numpy's parser of headers raises tokenize's own error; zipfile seeks to before the file.
    unended = npy(arrays()["train_x"]).replace(b"}", b" ")
    whole = archive()
    offset = int.from_bytes(whole[-6:-2], "little") + 5
    misplaced = whole[:-6] + offset.to_bytes(4, "little") + whole[-2:]
    objects = npy(np.array([None, 1]))
    overflowing = header((2**63, 2**63, 2, 3)) + bytes(12)
    stuff = {
        "idx": [idx(zeros(4)), gzip.compress(idx(zeros(4))), idx(zeros(4))[:15] + b"\xff"],
        "idx-labels": [idx(ROWS[:4], 0x0801), b"\0\0\x08\x01\xff\xff\xff\xff"],
        "idx-gz": [idx(zeros(4))],
        "cifar10": [bytes(3073), b"\x0a" + bytes(3072)],
        "imagenet32": [batch()],
        "imagenet32-data": [npy(np.zeros((1, 3072), np.uint8))],
        "imagenet32-labels": [npy(np.array([7])), npy(np.array([1001], np.uint16))],
        "images": [whole, misplaced, npz({name: npy(array) for name, array in arrays().items()})],
        "images-x": [npy(arrays()["train_x"]), huge, overflowing, unended, objects],
        "images-y": [npy(arrays()["train_y"]), npy(np.array(["a", "b"])), npy(np.array(1.5))],
    }
    places = {name: place for place, name in enumerate(TARGETS)}
    return {
        f"{name}-{number}": bytes([places[name]]) + content
        for name, contents in stuff.items()
        for number, content in enumerate(contents)
    }


if __name__ == "__main__":
    run(one_input, seeds, INSTRUMENTED)
