"""ImageNet 32x32: what is read is what was written, and all else is refused in words."""

import numpy as np
import pytest
import torch
from data_files import write_imagenet32

from snf_ext.training import data
from snf_ext.training.errors import UserError

SIZES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
TRAIN, VAL, TEST = sum(SIZES) - 7, 7, 4


def load(folder, **options):
    return data.load_imagenet32(folder, **({"train": TRAIN, "val": VAL, "test": TEST} | options))


def rewrite(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_split(tmp_path):
    *batches, last = write_imagenet32(tmp_path, tmp_path, SIZES, TEST)
    images = load(tmp_path, labels=True)
    assert (images.name, images.event_shape, images.classes) == ("imagenet32", (3, 32, 32), 1000)
    pixels = np.concatenate([batch["data"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches]) - 1
    # The frozen order of RandomState(0) says which validate; both parts stay in the files' order.
    validates = np.sort(np.random.RandomState(0).permutation(TRAIN + VAL)[:VAL])
    trains = np.setdiff1d(np.arange(TRAIN + VAL), validates)
    for split, known, rows in (
        (images.train, images.train_labels, trains),
        (images.val, images.val_labels, validates),
    ):
        assert split.dtype == torch.uint8
        assert np.array_equal(split.flatten(1).numpy(), pixels[rows])
        assert np.array_equal(split[:, 2, 1, 3].numpy(), pixels[rows, 2048 + 32 + 3])
        assert known.tolist() == labels[rows].tolist()
    assert np.array_equal(images.test.flatten(1).numpy(), last["data"])
    assert images.test_labels.tolist() == (last["labels"] - 1).tolist()
    plain = load(tmp_path)
    assert plain.classes == 0
    assert torch.equal(plain.val, images.val)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Imagenet32_train_npz", "Imagenet32_val_npz"), ("imagenet32", "imagenet32")],
)
def test_under_a_root(tmp_path, train, test):
    write_imagenet32(tmp_path / train, tmp_path / test, SIZES, TEST)
    assert len(load(tmp_path).train) == TRAIN


def test_labels_are_not_needed_if_not_asked_for(tmp_path):
    write_imagenet32(tmp_path, tmp_path, SIZES, TEST)
    rewrite(tmp_path / "train_data_batch_3.npz", labels=None)
    assert len(load(tmp_path).train) == TRAIN
    message = "batch_3.npz must hold the arrays data, labels; it lacks labels"
    with pytest.raises(UserError, match=message):
        load(tmp_path, labels=True)


BAD = {
    "key": ({"data": None}, "must hold the arrays data, labels; it lacks data"),
    "dtype": ({"data": np.zeros((1, 3072))}, r"data must be uint8 .*; got float64 of shape \(1, "),
    "size": ({"data": np.zeros((1, 3071), np.uint8)}, r"shape \(N, 3072\), .*\(1, 3071\)"),
    "rank": ({"data": np.zeros(3072, np.uint8)}, r"shape \(N, 3072\), .* of shape \(3072,\)"),
    "none": ({"data": np.zeros((0, 3072), np.uint8)}, "N at least 1; got uint8 of shape"),
    "labels": ({"labels": np.zeros(7, int)}, r"labels must be integers of shape \(1,\), .*\(7,\)"),
    "float labels": ({"labels": np.ones(1)}, "labels must be integers .*; got float64"),
    "label 0": ({"labels": np.array([0])}, r"labels must lie in 1\.\.1000; got 0\.\.0"),
    "label 1001": ({"labels": np.array([1001])}, r"must lie in 1\.\.1000; got 1001\.\.1001"),
    "pickled": (
        {"data": np.array([None, {}], dtype=object)},
        "must be a whole .npz file of plain arrays; got ValueError",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_batches_are_refused(tmp_path, changes, message):
    write_imagenet32(tmp_path, tmp_path, SIZES, TEST)
    rewrite(tmp_path / "train_data_batch_4.npz", **changes)
    with pytest.raises(UserError, match=f"train_data_batch_4.npz:? .*{message}"):
        load(tmp_path, labels=True)


def test_damaged_batches(tmp_path):
    write_imagenet32(tmp_path, tmp_path, SIZES, TEST)
    path = tmp_path / "val_data.npz"
    whole = path.read_bytes()
    for content in (b"", whole[:-30], whole[:1000], b"\x80\x04}\x94."):  # the last: a pickle
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"val_data.npz must be a whole .npz file of plain ar"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": TRAIN + 1}, rf"_10.npz must hold {TRAIN + VAL + 1} images; got {TRAIN + VAL}$"),
        ({"train": TRAIN - 1}, rf"must hold {TRAIN + VAL - 1} images; got {TRAIN + VAL} or more"),
        ({"train": 3, "val": 3}, "must hold 6 images; got 8 or more"),
        ({"test": 5}, "val_data.npz must hold 5 images; got 4$"),
        ({"test": 3}, "val_data.npz must hold 3 images; got 4 or more"),
    ],
)
def test_other_numbers_of_images(tmp_path, counts, message):
    write_imagenet32(tmp_path, tmp_path, SIZES, TEST)
    with pytest.raises(UserError, match=message):
        load(tmp_path, **counts)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="--data imagenet32 needs --data-dir: the folder that hol"):
        data.load("imagenet32")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; --data-dir must be a f"):
        data.load("imagenet32", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"train_data_batch_1.npz does not exist; the 10 b"):
        data.load("imagenet32", tmp_path)
    write_imagenet32(tmp_path, tmp_path / "elsewhere", SIZES, TEST)
    with pytest.raises(FileNotFoundError, match=r"val_data.npz does not exist; the 10 batches of"):
        load(tmp_path)
