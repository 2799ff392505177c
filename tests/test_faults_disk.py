"""Full and read-only disks, and signals while a checkpoint is written: the last one stays whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from cli_runs import QUICK, environment, one_line, run
from disks import disk, mounted, unmounted  # noqa: F401
from training_runs import same_run

from snf_ext.training import checkpoint
from snf_ext.training.loop import Trainer

FULL = (errno.ENOSPC, errno.EFBIG)
SETTINGS = [*QUICK, "--epochs", "4", "--limit-train", "100", "--evaluate-every", "1"]


def content(value, elements=50_000):
    return {
        "model": {"name": "fc", "settings": {}},
        "state": {"weight": torch.full((elements,), float(value))},
        "epoch": value,
        "val_nll": 0.5,
        "config": {},
    }


@pytest.mark.parametrize("room", [0, 4096, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint(disk, room):  # noqa: F811
    path = disk.folder / "last.pt"
    checkpoint.save(path, content(1))
    with disk.full(room), pytest.raises(OSError, match=r"last\.pt") as failure:
        checkpoint.save(path, content(2))
    assert failure.value.errno in FULL
    assert checkpoint.load(path)["epoch"] == 1
    assert [entry.name for entry in disk.folder.iterdir()] == ["last.pt"]
    checkpoint.save(path, content(3))
    assert checkpoint.load(path)["epoch"] == 3


def test_json_on_a_full_disk(disk):  # noqa: F811
    path = disk.folder / "history.json"
    checkpoint.write_json(path, [1])
    with disk.full(4096), pytest.raises(OSError, match=r"history\.json"):
        checkpoint.write_json(path, list(range(10_000)))
    assert checkpoint.read_json(path) == [1]


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on(
    disk,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    """Without room for a second ``last.pt``, and whatever else is written meanwhile."""
    folder, whole = disk.folder / "run", tmp_path / "whole"
    write = Trainer._write

    def filled(self, row, better):
        if row["epoch"] == 2:
            full.enter_context(disk.full(90_000))
        write(self, row, better)

    with monkeypatch.context() as patch, ExitStack() as full:
        patch.setattr(Trainer, "_write", filled)
        run(*SETTINGS, "--run-dir", folder, status=2)
    line = one_line(capsys)
    assert line.startswith("snf-ext: ")
    assert str(folder / "last.pt") in line
    assert os.strerror(errno.ENOSPC) in line or os.strerror(errno.EFBIG) in line
    assert checkpoint.load(folder / "last.pt", resume=True)["epoch"] == 1
    run("train", "--resume", "--run-dir", folder, "--no-progress")
    run(*SETTINGS, "--run-dir", whole)
    same_run(folder, whole)


# ---- folders that cannot be written


@pytest.fixture
def read_only(tmp_path):
    """A folder on a disk that is mounted read-only: root may write wherever modes forbid it."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    mounted(folder, "--bind", str(folder))
    try:
        mounted(folder, "-o", "remount,bind,ro")
        yield folder
    finally:
        unmounted(folder)


def test_a_new_run_in_a_read_only_folder(read_only, capsys):
    run(*SETTINGS, "--run-dir", read_only / "run", status=2)
    line = one_line(capsys)
    assert f"run folder {read_only / 'run'} must be writable; Read-only file system" in line


def test_a_checkpoint_in_a_read_only_folder(read_only):
    with pytest.raises(OSError, match=r"Read-only file system: .*last\.pt"):
        checkpoint.save(read_only / "last.pt", content(1))
    assert [entry.name for entry in read_only.iterdir()] == ["kept"]


def test_a_folder_of_another_user():
    """Where the modes count: root becomes somebody else."""
    with tempfile.TemporaryDirectory() as name:
        parent, folder = Path(name), Path(name) / "closed"
        parent.chmod(0o755)  # for the other one to look into
        folder.mkdir(mode=0o555)
        code = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from snf_ext.training.run import new_folder\n"
            "if os.getuid() == 0: os.setuid(65534)\n"
            f"try: new_folder(Path({str(folder)!r}), 'x')\n"
            "except ValueError as error: sys.exit(str(error))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
        )
        said = f"run folder {folder} must be writable; Permission denied\n"
        assert (done.returncode, done.stderr) == (1, said)


# ---- signals while a checkpoint is written

SAVE = """
import sys, torch
from pathlib import Path
from snf_ext.training import checkpoint
from snf_ext.training.signals import StopRequest
path = Path(sys.argv[1])
state = {"weight": torch.zeros(2_000_000)}
with StopRequest() as stop:
    for epoch in range(100_000):
        content = {"model": {}, "state": state, "epoch": epoch, "val_nll": 0.5, "config": {}}
        state["weight"].fill_(epoch)
        checkpoint.save(path, content)
        if epoch == 0:
            print("begun", flush=True)
        if stop.number:
            print(epoch, flush=True)
            sys.exit(0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_mid_write(tmp_path, number):
    """The process is stopped only where the temporary file is seen half written."""
    path, part = tmp_path / "last.pt", tmp_path / ".last.pt.part"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, path], stdout=subprocess.PIPE, env=environment(), text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        size = path.stat().st_size
        while not (part.is_file() and 0 < _size(part) < size):
            assert process.poll() is None
            time.sleep(0.0005)
        process.send_signal(number)
        out, _ = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    content = checkpoint.load(path)
    assert torch.equal(content["state"]["weight"], torch.full((2_000_000,), content["epoch"] * 1.0))
    if number == signal.SIGTERM:  # what was begun is ended
        assert process.returncode == 0
        assert content["epoch"] == int(out)
        assert not part.exists()
    else:
        assert process.returncode == -signal.SIGKILL


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has got its name
        return 0
