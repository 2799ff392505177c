"""Data sets: what they all have to be, where their files are, and which there are."""

import hashlib
from pathlib import Path

import pytest
import torch

from snf_ext.training import data, folders
from snf_ext.training.config import resolve
from snf_ext.training.errors import UserError


def test_unknown_name():
    with pytest.raises(
        UserError,
        match=r"data must be one of digits, mnist, .*; got 'cifar'",
    ):
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


def test_continuous_data_have_no_levels():
    points = torch.tensor([[-3.0, 300.0]])
    assert data.Dataset("mine", points, points, points, (2,), None).pixel_levels is None
    with pytest.raises(UserError, match=r"mine: test images must be finite; .* in image 0"):
        data.Dataset("mine", points, points, points / 0, (2,), None)


# ---- settings


@pytest.mark.parametrize(
    ("name", "steps", "batch_size", "warmup_epochs", "augment"),
    [("cifar10", 32, 100, 10.0, "flip-jitter"), ("imagenet32", 48, 64, 0.0, None)],
)
def test_paper_settings_of_colour_images(name, steps, batch_size, warmup_epochs, augment):
    """SNF A.3; the batch size of ImageNet is that of its timings."""
    config = resolve({"model": "glow", "data": name, "model_args": {"inverse": "penalty"}})
    assert config.model_args == {"levels": 3, "steps": steps, "inverse": "penalty"}
    assert (config.lr, config.recon_weight, config.clip_norm) == (1e-3, 1000.0, 10_000.0)
    assert (config.batch_size, config.warmup_epochs) == (batch_size, warmup_epochs)
    assert (config.optimizer, config.augment) == ("adam", augment)
    assert resolve({"model": "fc", "data": name}).lr == 1e-4
    assert resolve({"model": "conv", "data": name}).clip_norm is None


# ---- files


def test_a_folder_serves_itself_and_those_under_it(tmp_path):
    usual = ("first", "second/inner")
    assert folders.folder_of(tmp_path, ["a", "b"], usual) == tmp_path  # to say what is missing
    for folder in ("second/inner", "first", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "b").write_bytes(b"")
        assert folders.folder_of(tmp_path, ["a", "b"], usual) == tmp_path / folder


def test_checksum_of_parts():
    path, whole = Path("some.bin"), hashlib.md5(b"abcdef").hexdigest()
    folders.require_md5(path, (b"abc", bytearray(b"def")), whole, "Letters")
    other = hashlib.md5(b"abcdeg").hexdigest()
    with pytest.raises(UserError) as error:
        folders.require_md5(path, (b"abcdeg",), whole, "Letters")
    assert str(error.value) == (
        "some.bin must be a file of Letters: the MD5 of its content, uncompressed, must be "
        f"{whole}; got {other} (for other data in the same form: --no-verify)"
    )


@pytest.mark.parametrize("name", sorted(data.LOADERS))
def test_checksums_can_be_left_out_where_there_are_any(name, tmp_path):
    if name in data.VERIFIED:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            data.load(name, tmp_path, verify=False)
    else:
        message = f"--no-verify must be left out for {name}; data with checksums: mnist, cifar10"
        with pytest.raises(UserError, match=message):
            data.load(name, tmp_path, verify=False)
