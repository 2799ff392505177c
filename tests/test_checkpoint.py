"""Checkpoints: whole or not there, data and never code."""

import io
import os
import pickle

import pytest
import torch

from snf_ext.training import checkpoint
from snf_ext.training.errors import UserError

CONTENT = {
    "model": {"name": "fc", "settings": {"event_shape": (1, 8, 8)}},
    "state": {"weight": torch.arange(6.0).reshape(2, 3)},
    "epoch": 3,
    "val_nll": 1.5,
    "config": {"lr": 0.1},
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = tmp_path / "best.pt"
    checkpoint.save(path, CONTENT)
    content = checkpoint.load(path)
    assert torch.equal(content.pop("state")["weight"], CONTENT["state"]["weight"])
    assert content.pop("format") == "snf_ext checkpoint"
    assert content.pop("version") == 1
    assert content == {key: value for key, value in CONTENT.items() if key != "state"}
    assert names(tmp_path) == ["best.pt"]


def fail_while_writing(monkeypatch):
    def half(content, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)


def fail_at(name):
    def patch(monkeypatch):
        def fail(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, name, fail)

    return patch


@pytest.mark.parametrize("fail", [fail_while_writing, fail_at("fsync"), fail_at("replace")])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fail, before):
    path = tmp_path / "last.pt"
    if before:
        checkpoint.save(path, CONTENT)
    kept = path.read_bytes() if before else None
    with monkeypatch.context() as patched:
        fail(patched)
        with pytest.raises(OSError, match=r"No space left|Input/output"):
            checkpoint.save(path, CONTENT | {"epoch": 4})
    assert names(tmp_path) == (["last.pt"] if before else [])
    assert not before or path.read_bytes() == kept


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    checkpoint.save(tmp_path / "last.pt", CONTENT)
    assert calls == ["fsync", "replace"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    def write():
        with checkpoint.write_aside(tmp_path / "a") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == []


def test_json_has_no_nan(tmp_path):
    checkpoint.write_json(tmp_path / "history.json", [{"epoch": 1, "angle": None}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "history.json", [{"epoch": 1, "angle": float("nan")}])
    assert names(tmp_path) == ["history.json"]
    assert '"epoch": 1' in (tmp_path / "history.json").read_text()


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best.pt does not exist; a checkpoint must be"):
        checkpoint.load(tmp_path / "best.pt")


def test_truncated_at_any_length(tmp_path):
    path = tmp_path / "best.pt"
    checkpoint.save(path, CONTENT)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"best.pt must be a checkpoint of snf_ext"):
            checkpoint.load(path)


class Malicious:
    """Pickles to a call of ``os.system``."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "inside a checkpoint"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, how):
    path, marker = tmp_path / "best.pt", tmp_path / "marker"
    bomb = Malicious(marker)
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif how == "torch.save":
        torch.save(bomb, path)
    else:
        checkpoint.save(path, CONTENT | {"config": bomb})
    with pytest.raises(UserError, match="a checkpoint of snf_ext that loads as data alone"):
        checkpoint.load(path)
    assert not marker.exists()
    # The same file does run code where the loader lets it, so the refusal above is worth having.
    with open(path, "rb") as stream:
        if how == "pickle":
            pickle.load(stream)
        else:
            torch.load(io.BytesIO(stream.read()), weights_only=False)
    assert marker.exists()


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"best.pt .* got a file of another program"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="got a file of another program"):
        checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "version": 99, **CONTENT}, path)
    with pytest.raises(UserError, match="must be of checkpoint version 1; got 99"):
        checkpoint.load(path)


@pytest.mark.parametrize("key", CONTENT)
def test_a_part_that_is_missing_or_of_another_type_is_named(tmp_path, key):
    path = tmp_path / "best.pt"
    for content in (
        {k: v for k, v in CONTENT.items() if k != key},
        CONTENT | {key: "something else"},
    ):
        checkpoint.save(path, content)
        with pytest.raises(UserError, match=f"best.pt must have the part '{key}'"):
            checkpoint.load(path)


def test_best_cannot_be_resumed(tmp_path):
    checkpoint.save(tmp_path / "best.pt", CONTENT)
    with pytest.raises(UserError, match="must have the part 'optimizer'"):
        checkpoint.load(tmp_path / "best.pt", resume=True)


def test_weights_of_another_model_are_refused(tmp_path):
    linear = torch.nn.Linear(3, 2)
    good = {"state": linear.state_dict()}
    checkpoint.load_weights(torch.nn.Linear(3, 2), good, tmp_path / "best.pt")
    for other in (torch.nn.Linear(4, 2), torch.nn.Linear(3, 2, bias=False)):
        with pytest.raises(UserError, match=r"best.pt must fit the model that it names; .*"):
            checkpoint.load_weights(other, good, tmp_path / "best.pt")
