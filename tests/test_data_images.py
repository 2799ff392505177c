"""Images from one .npz file: what is read is what was written, all else is refused in words."""

import numpy as np
import pytest
import torch
from data_files import SHARED, needs_images

from snf_ext.training import data
from snf_ext.training.errors import UserError


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


def test_images_under_a_root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "images" / "some.npz", **arrays())
    np.savez(tmp_path / "other" / "more.npz", **arrays())
    assert data.load("images", tmp_path).event_shape == (3, 2, 3)


@needs_images
def test_the_natural_images():
    images = data.load("images", SHARED, labels=True)
    assert [len(images.train), len(images.val), len(images.test)] == [9000, 1000, 2000]
    assert (images.event_shape, images.classes) == ((3, 32, 32), 10)
