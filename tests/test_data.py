"""Data sets: what is read is what was written, and everything else is refused in words."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from snf_ext.training import data
from snf_ext.training.errors import UserError
from snf_ext.training.idx import read_idx

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


def idx(images: torch.Tensor, magic: int = 0x0803) -> bytes:
    return struct.pack(f">I{images.dim()}I", magic, *images.shape) + images.numpy().tobytes()


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)


def write_mnist(folder: Path, train: int, test: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = random_images(train, 1), random_images(test, 2)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(first))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(second)))
    return first, second


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, pack):
    images = random_images(5)
    (tmp_path / "images").write_bytes(pack(idx(images)))
    assert torch.equal(read_idx(tmp_path / "images"), images)


THREE = idx(random_images(3))
BAD_IDX = {
    "empty": (b"", "must start with an IDX magic number .* got an empty file"),
    "short magic": (b"\0\0", "must start with an IDX magic number"),
    "png": (b"\x89PNG\r\n\x1a\n" + THREE, "must start with an IDX magic number .* got 0x89504e47"),
    "floats": (idx(random_images(3), 0x0D03), r"must hold unsigned bytes .*; got type 0x0d"),
    "labels": (
        idx(torch.zeros(3, dtype=torch.uint8), 0x0801),
        r"must have 3 dimensions \(N, H, W\); got 1",
    ),
    "short header": (THREE[:9], "must have a header of 16 bytes; got 9"),
    "image size": (
        idx(random_images(3)[:, :, :27]),
        r"must hold images of \(28, 28\); got \(28, 27\)",
    ),
    "no image": (idx(random_images(0)), "must hold at least one image; got none"),
    "truncated": (THREE[:-1], "must hold 2352 bytes of images, as its header says; got 2351"),
    "trailing": (THREE + b"\0", "must hold 2352 bytes of images, as its header says; got more"),
    "huge header": (struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28), "must hold at most"),
    "truncated gzip": (gzip.compress(THREE)[:-20], "must be a whole gzip file; got a damaged one"),
    "gzip header alone": (b"\x1f\x8b", "must be a whole gzip file"),
    "gzip checksum": (gzip.compress(THREE)[:-8] + bytes(8), "must be a whole gzip file"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_bad_idx_is_refused(tmp_path, content, message):
    path = tmp_path / "images-file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"images-file {message}"):
        read_idx(path)


def test_missing_idx(tmp_path):
    with pytest.raises(FileNotFoundError, match="images-file does not exist"):
        read_idx(tmp_path / "images-file")


def test_mnist_split(tmp_path):
    first, second = write_mnist(tmp_path, 12, 4)
    mnist = data.load_mnist(tmp_path, train=10, val=2, test=4)
    assert (mnist.event_shape, mnist.pixel_levels, mnist.name) == ((1, 28, 28), 256, "mnist")
    assert torch.equal(mnist.train, first[:10, None])
    assert torch.equal(mnist.val, first[10:, None])
    assert torch.equal(mnist.test, second[:, None])


def test_mnist_with_too_few_images(tmp_path):
    write_mnist(tmp_path, 12, 4)
    with pytest.raises(UserError, match="train-images-idx3-ubyte must hold 60000 images; got 12"):
        data.load("mnist", tmp_path)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz must hold 5 images; got 4"):
        data.load_mnist(tmp_path, train=10, val=2, test=5)


def test_mnist_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--data mnist needs --data-dir"):
        data.load("mnist")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; --data-dir must be a"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte does not exist, nor"):
        data.load("mnist", tmp_path)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the repository")
def test_the_real_mnist():
    mnist = data.load("mnist", MNIST)
    assert [len(split) for split in (mnist.train, mnist.val, mnist.test)] == [50000, 10000, 10000]
    # Published mean and deviation of the 60,000 training pixels, in units of 255.
    pixels = torch.cat([mnist.train, mnist.val]).float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (digits.event_shape, digits.pixel_levels) == ((1, 8, 8), 17)
    assert digits.train.dtype == torch.uint8
    together = torch.cat([digits.train, digits.val, digits.test]).flatten(1).numpy()
    expected = load_digits().data
    # Each image once, whatever the order.
    assert np.array_equal(
        together[np.lexsort(together.T)], expected[np.lexsort(expected.T)].astype(np.uint8)
    )


def test_digits_split_is_fixed():
    torch.manual_seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    second = data.load("digits")
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.test, second.test)
    # Figures of one version can be compared with those of the next.
    assert first.test[:2, 0, 3].tolist() == [[0, 8, 14, 1, 14, 7, 0, 0], [0, 0, 9, 16, 15, 8, 0, 0]]


def test_unknown_name():
    with pytest.raises(UserError, match="data must be one of digits, mnist, images; got 'cifar'"):
        data.load("cifar")


def dataset(train: torch.Tensor) -> data.Dataset:
    good = torch.zeros(2, 1, 2, 2)
    return data.Dataset("mine", train, good, good, (1, 2, 2), 17)


def test_data_is_checked_before_training():
    images = torch.zeros(4, 1, 2, 2)
    dataset(images)
    for bad in (float("nan"), float("inf")):
        broken = images.clone()
        broken[2, 0, 1, 1] = bad
        with pytest.raises(UserError, match=r"mine: train images must be finite; .* in image 2"):
            dataset(broken)
    with pytest.raises(UserError, match=r"must lie in 0\.\.16; got 0\.0\.\.17\.0"):
        dataset(images.index_fill(0, torch.tensor([1]), 17.0))
    with pytest.raises(UserError, match=r"must have shape \(N, \*\(1, 2, 2\)\); got \(4, 1, 2\)"):
        dataset(images[..., 0])
    with pytest.raises(UserError, match="train images must be at least one; got none"):
        dataset(images[:0])


def test_limit_train():
    full = dataset(torch.arange(16.0).reshape(4, 1, 2, 2))
    assert full.limit_train(None) is full
    assert torch.equal(full.limit_train(2).train, full.train[:2])
    for count in (0, 5):
        with pytest.raises(UserError, match=rf"limit_train must lie in 1\.\.4; got {count}"):
            full.limit_train(count)
