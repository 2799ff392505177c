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


# ---- labels


def test_labels_stay_beside_their_images():
    from sklearn.datasets import load_digits

    plain, digits = data.load("digits"), data.load("digits", labels=True)
    assert plain.classes == 0
    assert plain.train_labels is None
    assert digits.classes == 10
    bundled = load_digits()
    number_of = {
        image.astype(np.uint8).tobytes(): label
        for image, label in zip(bundled.data, bundled.target, strict=True)
    }
    for split in ("train", "val", "test"):
        images, labels = getattr(digits, split), digits.labels(split)
        assert torch.equal(images, getattr(plain, split))
        assert labels.dtype == torch.int64
        assert labels.tolist() == [number_of[image.numpy().tobytes()] for image in images]
    few = digits.limit_train(7)
    assert torch.equal(few.train_labels, digits.train_labels[:7])


def write_labels(folder: Path, name: str, labels: torch.Tensor) -> None:
    (folder / name).write_bytes(gzip.compress(idx(labels, 0x0801)))


def test_mnist_labels(tmp_path):
    write_mnist(tmp_path, 12, 4)
    first = torch.arange(12, dtype=torch.uint8) % 10
    write_labels(tmp_path, "train-labels-idx1-ubyte.gz", first)
    write_labels(tmp_path, "t10k-labels-idx1-ubyte", torch.tensor([9, 8, 7, 6], dtype=torch.uint8))
    mnist = data.load_mnist(tmp_path, labels=True, train=10, val=2, test=4)
    assert mnist.train_labels.tolist() == list(range(10))
    assert mnist.val_labels.tolist() == [0, 1]
    assert mnist.test_labels.tolist() == [9, 8, 7, 6]


def test_mnist_labels_that_cannot_be_used(tmp_path):
    write_mnist(tmp_path, 12, 4)

    def load():
        data.load_mnist(tmp_path, labels=True, train=10, val=2, test=4)

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


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the repository")
def test_the_real_mnist_labels():
    mnist = data.load("mnist", MNIST, labels=True)
    together = torch.cat([mnist.train_labels, mnist.val_labels])
    assert int((together == 0).sum()) == 5923  # the published counts
    assert int((mnist.test_labels == 0).sum()) == 980


def test_labels_are_checked_before_training():
    images = torch.zeros(3, 1, 2, 2)
    good = torch.tensor([0, 1, 2])

    def make(train, classes=3):
        return data.Dataset(
            "mine", images, images, images, (1, 2, 2), 17, train, good, good, classes
        )

    assert make(good).labels("train") is good
    for bad, message in {
        good[:2]: r"train labels must be int64 of shape \(3,\), one an image; got .* \(2,\)",
        good.float(): "train labels must be int64 .*; got torch.float32",
        good + 1: r"train labels must lie in 0\.\.2; got 1\.\.3",
        good - 1: r"train labels must lie in 0\.\.2; got -1\.\.1",
        None: "train labels must be there exactly if there are classes",
    }.items():
        with pytest.raises(UserError, match=f"mine: {message}"):
            make(bad)
    with pytest.raises(UserError, match="must be there exactly if there are classes"):
        make(good, classes=0)


# ---- images from an .npz file


def colours(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)


def arrays(**changes) -> dict:
    content = {
        "train_x": colours(1004, 1),
        "train_y": np.arange(1004, dtype=np.uint8) % 4,
        "test_x": colours(5, 2),
        "test_y": np.array([0, 1, 2, 3, 0], dtype=np.int32),
    }
    content |= changes
    return {name: array for name, array in content.items() if array is not None}


def test_images_from_npz(tmp_path):
    np.savez_compressed(tmp_path / "some.npz", **arrays())
    for where in (tmp_path, tmp_path / "some.npz"):
        images = data.load("images", where, labels=True)
        assert (images.event_shape, images.pixel_levels, images.classes) == ((3, 2, 3), 256, 4)
        assert [len(s) for s in (images.train, images.val, images.test)] == [4, 1000, 5]
        together = torch.cat([images.train, images.val]).permute(0, 2, 3, 1)
        assert np.array_equal(together.numpy(), arrays()["train_x"])
        assert torch.cat([images.train_labels, images.val_labels]).tolist() == [0, 1, 2, 3] * 251
        assert images.test_labels.tolist() == [0, 1, 2, 3, 0]
    np.savez(tmp_path / "some.npz", **arrays(train_y=None, test_y=None))
    assert data.load("images", tmp_path).classes == 0


BAD_NPZ = {
    "array missing": ({"test_x": None}, "must hold the arrays train_x, test_x, .*lacks test_x"),
    "labels missing": ({"train_y": None}, "it lacks train_y"),
    "floats": (
        {"train_x": colours(1004).astype(np.float32)},
        r"train_x must be uint8 of shape \(N, H, W, C\) with C 1 or 3 .*; got float32",
    ),
    "channels first": (
        {"test_x": colours(5).transpose(0, 3, 1, 2)[..., :2]},
        r"test_x must be uint8 of shape .*; got uint8 of shape \(5, 3, 2, 2\)",
    ),
    "rank": ({"test_x": colours(5)[0]}, r"test_x must be .*; got uint8 of shape \(2, 3, 3\)"),
    "no image": ({"test_x": colours(0)}, r"N at least 1; got uint8 of shape \(0, 2, 3, 3\)"),
    "too few": ({"train_x": colours(1000)}, "must hold more than the 1000 images .*; got 1000"),
    "sizes differ": (
        {"test_x": colours(5)[:, :1]},
        r"test images must have shape \(N, \*\(3, 2, 3\)\); got \(5, 3, 1, 3\)",
    ),
    "label count": (
        {"train_y": np.zeros(7, np.uint8)},
        r"train_y must be integers of shape \(1004,\), one an image; got uint8 of shape \(7,\)",
    ),
    "label type": ({"test_y": np.zeros(5)}, "test_y must be integers .*; got float64"),
    "negative label": ({"test_y": np.full(5, -1)}, r"test labels must lie in 0\.\.3; got -1"),
    "huge label": ({"test_y": np.full(5, 10**9)}, "must number the classes from 0; got 1000000000"),
    "objects": (
        {"test_y": np.array([None] * 5, dtype=object)},
        "must be a whole .npz file of plain arrays; got ValueError",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "some.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message):
        data.load("images", tmp_path / "some.npz", labels=True)


def test_damaged_npz(tmp_path):
    path = tmp_path / "some.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[2000] ^= 255
    for content in (b"", b"\x89PNG\r\n\x1a\n", whole[:-30], whole[:100], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"some.npz must be a whole .npz file of plain arrays"):
            data.load("images", path)
    with open(path, "wb") as stream:
        np.save(stream, colours(3))
    with pytest.raises(UserError, match=r"must be an .npz file of several arrays; got a single"):
        data.load("images", path)


def test_npz_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--data images needs --data-dir: the .npz file of images"):
        data.load("images")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; an .npz file of images"):
        data.load("images", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"must hold one .npz file, or .* name it; got none"):
        data.load("images", tmp_path)
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"got a.npz, b.npz"):
        data.load("images", tmp_path)
