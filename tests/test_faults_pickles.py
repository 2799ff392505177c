"""Files from elsewhere never run code: a pickle in any of them is refused, and not run."""

from __future__ import annotations

import ast
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CIFAR10_BATCHES, write_cifar10, write_imagenet32, write_labels, write_mnist
from experiment_runs import reproduce
from training_runs import new_run, trainer

import snf_ext
from snf_ext import cli
from snf_ext.experiments import folders
from snf_ext.training import checkpoint, data
from snf_ext.training.angle_log import AngleLog
from snf_ext.training.errors import UserError
from snf_ext.training.run import open_folder
from snf_ext.training.trackers import Records

PACKAGE = Path(snf_ext.__file__).parent


class Bomb:
    """Pickles to a call that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def bomb(tmp_path):
    """A pickle that runs where it is unpickled; whether it did is looked at in the end."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()  # it works
    marker.unlink()
    yield Bomb(marker)
    assert not marker.exists()


# ---- checkpoints


def stored(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def in_archive(content, path):
    """A whole checkpoint, of whose pickle only the bomb is left."""
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, pickle.dumps(content) if name.endswith("data.pkl") else member)
    return stream.getvalue()


def in_tar(content, path):
    """torch's oldest format."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member, text = tarfile.TarInfo(name), pickle.dumps(content)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return stream.getvalue()


def in_stream(content, path):
    """torch's format before archives."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


FORMS = {
    "a pickle": lambda content, path: pickle.dumps(content),
    "in an archive": in_archive,
    "in torch's stream": in_stream,
    "in a tar": in_tar,
    "saved": lambda content, path: stored(content),
}
PLACES = ("model", "state", "epoch", "config", "optimizer", "history", "best", "start", "guard")


@pytest.fixture
def last(tmp_path):
    run = new_run(tmp_path / "run")
    return run.folder / "last.pt"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_checkpoint_that_is_a_pickle(last, bomb, form):
    last.write_bytes(form(bomb, last))
    refused(last)


@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_a_part_of_a_checkpoint(last, bomb, place):
    content = checkpoint.load(last, resume=True)
    inner = content[place] if isinstance(content.get(place), dict) else {}
    last.write_bytes(stored({**content, place: {**inner, "more": bomb}}))
    refused(last)


def refused(last):
    message = r"last\.pt must be a checkpoint of snf_ext that loads as data alone"
    with pytest.raises(UserError, match=message):
        checkpoint.load(last, resume=True)
    with pytest.raises(UserError, match=message):
        open_folder(last.parent)
    assert cli.main(["evaluate", "--checkpoint", str(last)]) == 2
    assert cli.main(["sample", "--checkpoint", str(last)]) == 2


@pytest.mark.parametrize("wide", [False, True])
def test_an_optimizer_state_of_other_shapes(last, wide):
    """torch's fused Adam believes what is loaded, and reads and writes beyond it."""
    run = trainer(last.parent)
    run.resume(checkpoint.load(last, resume=True), last)
    assert run.fit()
    content = checkpoint.load(last, resume=True)
    state = content["optimizer"]["state"]
    for of in state.values():
        shape = of["exp_avg"].shape
        of["exp_avg"] = torch.zeros(1).expand(shape) if wide else torch.zeros(1)
    if wide:  # of the right shape: it gets memory of its own
        run.resume(content, last)
        moments = [of["exp_avg"] for of in run.optimizer.state.values()]
        assert all(moment.is_contiguous() for moment in moments)
    else:
        with pytest.raises(UserError, match=r"last\.pt must fit the optimizer; the state of a par"):
            run.resume(content, last)


# ---- checkpoints that are more than they are


def test_tensors_larger_than_their_bytes(tmp_path):
    path = tmp_path / "best.pt"
    small = torch.zeros(4)
    content = {"model": {}, "state": {"w": small}, "epoch": 1, "val_nll": 1.0, "config": {}}
    checkpoint.save(path, content)
    text = path.read_bytes()
    checkpoint.load(path)
    small.resize_(100_000)  # more than is stored, as a changed pickle says
    checkpoint.save(path, content)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member[:16] if name.endswith("data/0") else member)
    assert path.stat().st_size < 2 * len(text)
    with pytest.raises(UserError, match=r"best\.pt must"):
        checkpoint.load(path)


def test_a_packed_checkpoint(tmp_path):
    """A megabyte of zeros packs to a kilobyte; a thousand of them would fill the memory."""
    path = tmp_path / "best.pt"
    state = {"w": torch.zeros(250_000)}
    checkpoint.save(path, {"model": {}, "state": state, "epoch": 1, "val_nll": 1.0, "config": {}})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    with pytest.raises(UserError, match="loads as data alone"):
        checkpoint.load(path)


# ---- data


def test_data_with_pickles(tmp_path, bomb):
    text = pickle.dumps(bomb)
    mnist, cifar, imagenet = (tmp_path / name for name in ("mnist", "cifar", "imagenet"))
    mnist.mkdir()
    write_mnist(mnist, 4, 2)
    for name in ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        count = 4 if name.startswith("train") else 2
        write_labels(mnist, name, torch.zeros(count, dtype=torch.uint8))
    write_cifar10(cifar, dict.fromkeys(CIFAR10_BATCHES, 1) | {"test_batch": 1})
    write_imagenet32(imagenet, imagenet, [1] * 10, 2)
    sizes = {"verify": False, "train": 3, "val": 1, "test": 2}
    for file, load in (
        (mnist / "train-images-idx3-ubyte", lambda: data.load_mnist(mnist, True, **sizes)),
        (
            cifar / "data_batch_2.bin",
            lambda: data.load_cifar10(cifar, True, verify=False, train=4, val=1, test=1),
        ),
        (
            imagenet / "train_data_batch_2.npz",
            lambda: data.load_imagenet32(imagenet, True, train=8, val=2, test=2),
        ),
    ):
        load()
        file.write_bytes(text)
        with pytest.raises(UserError, match=file.name):
            load()


@pytest.mark.parametrize("form", ["pickle", "object array", "npy of objects", "packed pickle"])
def test_images_with_pickles(tmp_path, bomb, form):
    path = tmp_path / "images.npz"
    objects = np.array([bomb], dtype=object)
    if form == "object array":
        np.savez(path, train_x=objects, test_x=objects)
    elif form == "npy of objects":
        with open(path, "wb") as file:
            np.save(file, objects, allow_pickle=True)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("train_x.npy", "test_x.npy"):
                archive.writestr(name, pickle.dumps(bomb))
    with pytest.raises(UserError, match=r"images\.npz must be a"):
        data.load_images(path)


# ---- the text files of a run


def test_text_files_that_are_pickles(tmp_path, bomb):
    text = pickle.dumps(bomb)
    settings = {"lr": 1}
    for name in ("config.json", "trackers.json", "angles.csv", "settings.json"):
        (tmp_path / name).write_bytes(text)
    for read in (
        lambda: open_folder(tmp_path),
        lambda: Records(tmp_path / "trackers.json"),
        lambda: AngleLog(tmp_path / "angles.csv", done=3),
        lambda: folders.claim(tmp_path, settings),
    ):
        with pytest.raises(UserError):
            read()
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "outcome.json").write_bytes(text)
    with pytest.raises(UserError, match=r"outcome\.json must be whole JSON"):
        folders.outcome(tmp_path, settings)


def test_an_experiment_with_a_pickle(tmp_path, bomb):
    reproduce(tmp_path, only=["fc-snf"])
    (tmp_path / "table1" / "fc-snf" / "seed-0" / "outcome.json").write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match=r"outcome\.json must be whole JSON"):
        reproduce(tmp_path, only=["fc-snf"])


# ---- the source


UNPICKLERS = ("pickle", "marshal", "shelve", "joblib", "dill")


def _calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            words = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            yield ast.unparse(node.func), words


def test_nothing_in_the_package_unpickles():
    """Tensors are loaded with ``weights_only=True`` said, arrays with ``allow_pickle=False``."""
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE)
        for name, words in _calls(path):
            end = name.rpartition(".")[2]
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "joblib.", "dill.")), (
                where
            )
            if name == "torch.load":
                assert words.get("weights_only") is True, where
                seen.add(name)
            if end in ("read_array", "load") and name.partition(".")[0] in ("np", "numpy"):
                assert words.get("allow_pickle") is False, where
                seen.add(end)
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text, where
        assert "weights_only=False" not in text, where
    assert {"torch.load", "read_array"} <= seen  # the search finds what there is
