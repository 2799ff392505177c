"""CIFAR-10: what is read is what was written, and all else is refused in words."""

import hashlib
import re

import numpy as np
import pytest
import torch
from data_files import CIFAR10_BATCHES, write_cifar10

from snf_ext.training import cifar10, data
from snf_ext.training.errors import UserError

COUNTS = dict.fromkeys(CIFAR10_BATCHES, 3) | {"test_batch": 4}


def load(folder, **options):
    settings = {"train": 12, "val": 3, "test": 4, "verify": False}
    return data.load_cifar10(folder, **(settings | options))


def test_split_of_records(tmp_path):
    content = write_cifar10(tmp_path, COUNTS)
    images = load(tmp_path)
    assert (images.name, images.event_shape, images.pixel_levels) == ("cifar10", (3, 32, 32), 256)
    assert images.classes == 0
    train = np.concatenate([content[name] for name in CIFAR10_BATCHES])
    for split, records in (
        (images.train, train[:12]),
        (images.val, train[12:]),
        (images.test, content["test_batch"]),
    ):
        assert split.dtype == torch.uint8
        # Byte 1 + 1024 c + 32 h + w of a record is channel c at row h and column w.
        for c, h, w in ((0, 0, 0), (0, 0, 31), (0, 1, 0), (1, 0, 0), (2, 31, 31)):
            wanted = records[:, 1 + 1024 * c + 32 * h + w]
            assert split[:, c, h, w].tolist() == wanted.tolist()
        assert np.array_equal(split.flatten(1).numpy(), records[:, 1:])
    known = load(tmp_path, labels=True)
    assert known.classes == 10
    labels = torch.cat([known.train_labels, known.val_labels])
    assert labels.tolist() == train[:, 0].tolist()
    assert known.test_labels.tolist() == content["test_batch"][:, 0].tolist()
    assert torch.equal(known.train, images.train)


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin", "cifar10"])
def test_under_a_root(tmp_path, folder):
    write_cifar10(tmp_path / folder, COUNTS)
    assert len(load(tmp_path).train) == 12


def test_each_file_must_be_cifar10s(tmp_path, monkeypatch):
    content = write_cifar10(tmp_path, COUNTS)
    right = {f"{n}.bin": hashlib.md5(c.tobytes()).hexdigest() for n, c in content.items()}
    monkeypatch.setattr(cifar10, "MD5", right)
    assert len(load(tmp_path, verify=True).train) == 12
    for name, md5 in right.items():
        monkeypatch.setattr(cifar10, "MD5", right | {name: "0" * 32})
        message = rf"{re.escape(name)} must be a file of CIFAR-10: .* got {md5} .*--no-verify"
        with pytest.raises(UserError, match=message):
            load(tmp_path, verify=True)


def test_files_of_another_size(tmp_path):
    write_cifar10(tmp_path, COUNTS)
    with pytest.raises(
        UserError,
        match=r"data_batch_1.bin must hold 10000 records of 3073 bytes, 30730000 .*; got 9219",
    ):
        data.load("cifar10", tmp_path)
    path = tmp_path / "data_batch_4.bin"
    whole = path.read_bytes()
    for bad in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(bad)
        message = rf"data_batch_4.bin must hold 3 records .*, 9219 in all; got {len(bad)}"
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_labels_out_of_range(tmp_path):
    content = write_cifar10(tmp_path, COUNTS)
    records = content["test_batch"]
    records[:, 0] = [3, 10, 2, 9]
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    message = r"test_batch.bin: labels must lie in 0\.\.9; got 2\.\.10"
    with pytest.raises(UserError, match=message):
        load(tmp_path)  # asked for or not: such a file is another one


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--data cifar10 needs --data-dir: the folder that holds"):
        data.load("cifar10")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; --data-dir must be a f"):
        data.load("cifar10", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.bin does not exist; it must be th"):
        data.load("cifar10", tmp_path)
    write_cifar10(tmp_path, COUNTS)
    (tmp_path / "data_batch_2.bin").rename(tmp_path / "data_batch_2")
    message = "data_batch_2.bin does not exist; .*; data_batch_2 there is of the pickled version"
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)
