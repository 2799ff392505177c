"""One process at a time in a run's folder, and what ends a process ends its hold."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from cli_runs import QUICK, environment, one_line, run
from experiment_runs import reproduce

from snf_ext.training import checkpoint
from snf_ext.training.errors import UserError
from snf_ext.training.lock import held

USED = "must be of one process at a time; another one runs in it"

HOLD = """
import sys
from pathlib import Path
from snf_ext.training.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts processes that hold folders; none outlives its test."""
    processes = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_and_released_by_its_death(tmp_path, holder):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=USED), held(tmp_path):
        raise AssertionError
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(tmp_path):
        assert list(tmp_path.iterdir()) == []  # nothing is left to be in anyone's way


def test_a_hold_is_not_inherited(tmp_path):
    """A program that a run starts, a tracker's say, may outlive it."""
    with held(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with held(tmp_path):
        pass
    child.communicate(b"\n")


def test_without_locks_of_folders_a_run_just_runs(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with held(tmp_path), held(tmp_path):
        pass


def test_the_second_process_of_a_run_is_refused(tmp_path, holder, capsys):
    """By --resume, before it has changed anything; and by a new run in an empty folder."""
    folder, empty = tmp_path / "run", tmp_path / "empty"
    settings = ["--epochs", "1", "--limit-train", "50", "--run-dir"]
    run(*QUICK, *settings, folder)
    empty.mkdir()
    (folder / ".last.pt.part").write_bytes(b"of the one that is writing")
    before = {path.name for path in folder.iterdir()}
    capsys.readouterr()
    first, other = holder(folder), holder(empty)
    run("train", "--resume", "--run-dir", folder, "--no-progress", status=2)
    assert one_line(capsys) == f"snf-ext: run folder {folder} {USED}"
    assert {path.name for path in folder.iterdir()} == before
    run(*QUICK, *settings, empty, status=2)
    assert one_line(capsys) == f"snf-ext: run folder {empty} {USED}"
    for process in (first, other):
        process.kill()
        process.wait()
    run("train", "--resume", "--epochs", "2", "--run-dir", folder, "--no-progress")
    assert checkpoint.load(folder / "last.pt")["epoch"] == 2


def test_the_second_process_of_an_experiment_is_refused(tmp_path, holder):
    (tmp_path / "table1").mkdir()
    holder(tmp_path / "table1")
    with pytest.raises(UserError, match=f"table1 {USED}"):
        reproduce(tmp_path, only=["fc-snf"])
    assert list((tmp_path / "table1").iterdir()) == []


@pytest.mark.slow
def test_processes_of_one_run_hold_it_together(tmp_path):
    """torchrun's: the first one holds, and none is in another's way; a further run is refused."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "snf_ext", *QUICK, "--limit-train", "100"]
    run = subprocess.Popen(
        [*command, "--epochs", "100000", "--run-dir", tmp_path / "run"],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "run" / "history.json").is_file():
            assert run.poll() is None
            time.sleep(0.1)
        with pytest.raises(UserError, match=USED), held(tmp_path / "run"):
            raise AssertionError
    finally:
        run.terminate()  # which it passes on
        run.wait()
    with held(tmp_path / "run"):
        pass
