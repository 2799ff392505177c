"""MNIST and IDX files: what is read is what was written, and all else is refused in words."""

import gzip
import hashlib
import struct

import pytest
import torch
from data_files import SHARED, idx, needs_mnist, random_images, write_labels, write_mnist

from snf_ext.training import data, mnist
from snf_ext.training.errors import UserError
from snf_ext.training.idx import header, read_idx


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
    mnist = data.load_mnist(tmp_path, train=10, val=2, test=4, verify=False)
    assert (mnist.event_shape, mnist.pixel_levels, mnist.name) == ((1, 28, 28), 256, "mnist")
    assert torch.equal(mnist.train, first[:10, None])
    assert torch.equal(mnist.val, first[10:, None])
    assert torch.equal(mnist.test, second[:, None])


def test_mnist_with_too_few_images(tmp_path):
    write_mnist(tmp_path, 12, 4)
    with pytest.raises(UserError, match="train-images-idx3-ubyte must hold 60000 images; got 12"):
        data.load("mnist", tmp_path)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz must hold 5 images; got 4"):
        data.load_mnist(tmp_path, train=10, val=2, test=5, verify=False)


def test_mnist_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--data mnist needs --data-dir"):
        data.load("mnist")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; --data-dir must be a f"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte does not exist, nor"):
        data.load("mnist", tmp_path)


def test_mnist_labels(tmp_path):
    write_mnist(tmp_path, 12, 4)
    first = torch.arange(12, dtype=torch.uint8) % 10
    write_labels(tmp_path, "train-labels-idx1-ubyte.gz", first)
    write_labels(tmp_path, "t10k-labels-idx1-ubyte", torch.tensor([9, 8, 7, 6], dtype=torch.uint8))
    mnist = data.load_mnist(tmp_path, labels=True, train=10, val=2, test=4, verify=False)
    assert mnist.train_labels.tolist() == list(range(10))
    assert mnist.val_labels.tolist() == [0, 1]
    assert mnist.test_labels.tolist() == [9, 8, 7, 6]


def test_mnist_labels_that_cannot_be_used(tmp_path):
    write_mnist(tmp_path, 12, 4)

    def load():
        data.load_mnist(tmp_path, labels=True, train=10, val=2, test=4, verify=False)

    with pytest.raises(
        FileNotFoundError,
        match=r"train-labels-idx1-ubyte does not exist, nor .*; a conditional flow needs the",
    ):
        load()
    labels = torch.arange(12, dtype=torch.uint8)
    write_labels(tmp_path, "t10k-labels-idx1-ubyte", labels[:4])
    write_labels(tmp_path, "train-labels-idx1-ubyte", labels[:11])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte must hold 12 labels; got 11"):
        load()
    write_labels(tmp_path, "train-labels-idx1-ubyte", labels)
    with pytest.raises(UserError, match=r"mnist: val labels must lie in 0\.\.9; got 10\.\.11"):
        load()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(random_images(3)))
    with pytest.raises(UserError, match=r"must have 1 dimension \(N\); got 3"):
        load()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels, 0x0801)[:-1])
    with pytest.raises(UserError, match="must hold 12 bytes of labels, as its header says; got 11"):
        load()


# ---- where the files are, and whether they are MNIST's


@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw"])
def test_mnist_under_a_root(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    first, _ = write_mnist(place, 12, 4)
    images = data.load_mnist(tmp_path, train=10, val=2, test=4, verify=False)
    assert torch.equal(images.train, first[:10, None])


def test_header_is_that_of_the_file():
    content = idx(random_images(3))
    assert header(random_images(3)) == content[:16]
    labels = torch.arange(3, dtype=torch.uint8)
    assert header(labels) == idx(labels, 0x0801)[:8]


@pytest.mark.parametrize("which", range(4))
def test_each_file_must_be_mnists(tmp_path, monkeypatch, which):
    first, second = write_mnist(tmp_path, 12, 4)
    labels = torch.arange(12, dtype=torch.uint8) % 10
    write_labels(tmp_path, "train-labels-idx1-ubyte", labels)
    write_labels(tmp_path, "t10k-labels-idx1-ubyte.gz", labels[:4])
    content = idx(first), idx(second), idx(labels, 0x0801), idx(labels[:4], 0x0801)
    names = mnist.TRAIN, mnist.TEST, mnist.TRAIN_LABELS, mnist.TEST_LABELS
    right = {n: hashlib.md5(c).hexdigest() for n, c in zip(names, content, strict=True)}
    monkeypatch.setattr(mnist, "MD5", right)

    def load(**options):
        return data.load_mnist(tmp_path, labels=True, train=10, val=2, test=4, **options)

    assert torch.equal(load().train, first[:10, None])
    wrong = right | {names[which]: "0" * 32}
    monkeypatch.setattr(mnist, "MD5", wrong)
    name, got = names[which], right[names[which]]
    with pytest.raises(UserError, match=rf"{name}\S* must be a file of MNIST: .* got {got}"):
        load()
    assert torch.equal(load(verify=False).train, first[:10, None])


@needs_mnist
def test_the_real_mnist():
    images = data.load("mnist", SHARED, labels=True)  # by its checksums
    assert [len(images.train), len(images.val), len(images.test)] == [50000, 10000, 10000]
    # Published mean and deviation of the 60,000 training pixels, in units of 255.
    pixels = torch.cat([images.train, images.val]).float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)
    together = torch.cat([images.train_labels, images.val_labels])
    assert int((together == 0).sum()) == 5923  # the published counts
    assert int((images.test_labels == 0).sum()) == 980
