"""Data through the commands: wrong data end a request before anything is made."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import QUICK, one_line, run
from data_files import CIFAR10_BATCHES, write_cifar10, write_imagenet32

from snf_ext.training import checkpoint, data
from snf_ext.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("in_own_folder")


def zeros(*shape):
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))


def fashion(folder):
    """As many images as MNIST has, but others."""
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(zeros(count, 28, 28))


def cut_off(folder):
    whole = gzip.compress(zeros(60_000, 28, 28), 1)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(whole[:-100])


def floats(folder):
    content = bytearray(zeros(60_000, 28, 28))
    content[2] = 0x0D
    (folder / "train-images-idx3-ubyte").write_bytes(content)


def short(folder):
    write_cifar10(folder / "cifar-10-batches-bin", dict.fromkeys(CIFAR10_BATCHES, 3))


def other_cifar10(folder):
    for name in (*CIFAR10_BATCHES, "test_batch"):
        with open(folder / f"{name}.bin", "wb") as stream:
            stream.truncate(10_000 * 3073)


def pickled(folder):
    write_imagenet32(folder, folder, [1] * 10, 1)
    objects = np.array([None], dtype=object)
    np.savez(folder / "train_data_batch_1.npz", data=objects, labels=objects)


def few(folder):
    write_imagenet32(folder / "Imagenet32_train_npz", folder / "Imagenet32_val_npz", [2] * 10, 1)


def no_test_images(folder):
    np.savez(folder / "some.npz", train_x=np.zeros((1040, 4, 4, 3), np.uint8))


def nothing(folder):
    pass


WRONG = {
    "mnist, another set": (
        fashion,
        "mnist",
        "train-images-idx3-ubyte must be a file of MNIST: the MD5 of its content, uncompressed, "
        "must be 6bbc9ace898e44ae57da46a324031adb; got",
    ),
    "mnist, cut off": (cut_off, "mnist", "ubyte.gz must be a whole gzip file; got a damaged one"),
    "mnist, floats": (floats, "mnist", "must hold unsigned bytes (type 0x08); got type 0x0d"),
    "mnist, missing": (nothing, "mnist", "train-images-idx3-ubyte does not exist, nor does"),
    "cifar10, short": (
        short,
        "cifar10",
        "cifar-10-batches-bin/data_batch_1.bin must hold 10000 records of 3073 bytes, 30730000 in",
    ),
    "cifar10, another set": (
        other_cifar10,
        "cifar10",
        "data_batch_1.bin must be a file of CIFAR-10: the MD5 of its content, uncompressed, must",
    ),
    "cifar10, missing": (nothing, "cifar10", "data_batch_1.bin does not exist; it must be there"),
    "imagenet32, pickled": (
        pickled,
        "imagenet32",
        "train_data_batch_1.npz must be a whole .npz file of plain arrays; got ValueError",
    ),
    "imagenet32, few": (few, "imagenet32", "_batch_10.npz must hold 1281167 images; got 20"),
    "imagenet32, missing": (nothing, "imagenet32", "train_data_batch_1.npz does not exist"),
    "images, key": (no_test_images, "images", "it lacks test_x"),
    "images, missing": (nothing, "images", "must hold one .npz file, or --data-dir name it"),
}


@pytest.mark.parametrize(("write", "name", "message"), WRONG.values(), ids=WRONG)
def test_wrong_data(tmp_path, capsys, monkeypatch, write, name, message):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    monkeypatch.setattr(Trainer, "begin", lambda self: pytest.fail("training began"))
    run(*QUICK, "--data", name, "--data-dir", folder, "--run-dir", "a", status=2)
    assert message in one_line(capsys)
    assert [path.name for path in Path.cwd().iterdir()] == ["data"]


MISFITS = {
    "conv": ("--model conv --data moons", "event_shape must be (C, H, W) with H and W divisible"),
    "glow": ("--model glow --data rings", "event_shape must be (C, H, W) with H and W divisible"),
    "augmented points": (
        "--model fc --data moons --augment flip",
        "augment must be none for events that are not (C, H, W); got flip for (2,)",
    ),
    "classes of points": (
        "--model glow --data checkerboard --conditional",
        "checkerboard has no classes; leave out --conditional",
    ),
    "no checksums": (
        "--model fc --data digits --no-verify",
        "--no-verify must be left out for digits; data with checksums: mnist, cifar10",
    ),
}


@pytest.mark.parametrize(("argv", "message"), MISFITS.values(), ids=MISFITS)
def test_data_that_do_not_fit_the_request(capsys, argv, message):
    run("train", *argv.split(), "--no-progress", status=2)
    assert message in one_line(capsys)
    assert not list(Path.cwd().iterdir())


def test_points_from_the_shell(capsys):
    argv = "train --data moons --model fc --model-args layers=4 --epochs 3 --angle-every 0"
    argv += " --limit-train 2000 --batch-size 50 --no-progress --run-dir a"
    run(*argv.split())
    printed = capsys.readouterr().out
    assert "bits/dim" not in printed
    result = json.loads(Path("a/result.json").read_text())
    assert f"test NLL: {result['test']['nll']:.3f} nats, exact (standard error" in printed
    # Some nats better than the start; a spline flow, trained to the end, has 1.86.
    assert 1.86 < result["test"]["nll"] < result["start_test_nll"] - 2
    settings = checkpoint.load(Path("a/best.pt"))["model"]["settings"]
    assert (settings["event_shape"], settings["pixel_levels"]) == ((2,), None)
    for name in ("samples", "reconstructions", "curves"):
        assert Path(f"a/{name}.png").read_bytes()[:4] == b"\x89PNG"
    run("evaluate", "--checkpoint", "a/best.pt", "--split", "val")
    printed = capsys.readouterr().out
    assert f"val NLL: {result['val_nll']:.3f} nats, exact (standard error" in printed
    run("sample", "--checkpoint", "a/best.pt", "--count", "100", "--out", "b.png")
    assert Path("b.png").is_file()
    run("evaluate", "--checkpoint", "a/best.pt", "--data", "digits", status=2)
    assert "data must have events (2,) of no levels" in capsys.readouterr().err


def test_other_images_in_the_form_of_mnist(tmp_path, monkeypatch, capsys):
    """--no-verify, in training and where a run is measured; a run knows its augmentation."""
    content = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)
    asked = []

    def load(folder, labels, verify=True):
        asked.append((folder, verify))
        return data.Dataset("mnist", content, content, content, (1, 4, 4), 256)

    monkeypatch.setitem(data.LOADERS, "mnist", load)
    options = ("--data-dir", "else", "--no-verify")
    run(*QUICK, "--data", "mnist", *options, "--epochs", "1", "--augment", "flip", "--run-dir", "a")
    assert checkpoint.load(Path("a/last.pt"))["config"]["augment"] == "flip"
    run("evaluate", "--checkpoint", "a/best.pt", *options)
    assert asked == [(Path("else"), False)] * 2
    run("train", "--resume", "--run-dir", "a", "--augment", "none", status=2)
    assert "augment must stay 'flip' when a run is resumed; got None" in capsys.readouterr().err
