"""``snf-ext train`` by several processes, and what happens when one of them is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_runs import environment

from snf_ext.training import checkpoint
from snf_ext.training.errors import Diverged, UserError
from snf_ext.training.world import ALONE, World, joined, local_device

TRAIN = ["-m", "snf_ext", "train", "--model", "fc", "--angle-every", "0", "--limit-train", "300"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


@pytest.fixture
def start():
    """Starts runs; none outlives its test."""
    runs = []

    def start(*args, **kwargs):
        runs.append(started(*args, **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def started(processes, *options, restarts=0):
    """A run by ``processes`` processes, or without torchrun by one."""
    command = [sys.executable, *TRAIN, "--no-progress", *map(str, options)]
    if processes:
        spread = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        command = [sys.executable, *TORCHRUN, *spread, *command[1:]]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(run, status=0):
    out, err = run.communicate(timeout=120)
    assert run.returncode == status, err
    return out, err


def assert_close(a, b):
    """The same weights up to float32's rounding in some ten steps, and likelihoods."""
    one, two = (checkpoint.load(folder / "last.pt") for folder in (a, b))
    assert one["epoch"] == two["epoch"]
    torch.testing.assert_close(one["state"], two["state"], rtol=1e-5, atol=1e-6)
    assert one["val_nll"] == pytest.approx(two["val_nll"], rel=1e-5)


def test_two_processes_share_a_run(start, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    runs = [start(n, "--epochs", 4, "--run-dir", d) for n, d in ((0, alone), (2, together))]
    (out, _), (out_together, _) = map(finish, runs)
    assert_close(alone, together)
    assert "4 epochs, in" in out
    assert "4 epochs, 2 processes, in" in out_together
    # One of them speaks and writes, and what they leave is what one process leaves.
    assert out_together.count("test NLL") == out.count("test NLL")
    names = [sorted(path.name for path in d.iterdir()) for d in (alone, together)]
    assert names[0] == names[1]
    results = [json.loads((d / "result.json").read_text()) for d in (alone, together)]
    assert results[0]["test"]["nll"] == pytest.approx(results[1]["test"]["nll"], rel=1e-5)


def test_a_request_that_cannot_be_used_is_told_once(start, tmp_path):
    _, err = finish(start(2, "--lr", "-1", "--run-dir", tmp_path / "run"), status=1)
    lines = [line for line in err.splitlines() if line.startswith("snf-ext:")]
    assert lines == ["snf-ext: lr must be positive and finite; got -1.0"]
    assert not (tmp_path / "run").exists()


def wait_for(run, what):
    for _ in range(600):
        if what():
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    raise AssertionError("it takes too long")


def workers(run):
    """The process numbers of ranks 0, 1, ..., by their environment."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                text = file.read().split(b"\0")
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        rank = [value[5:] for value in text if value.startswith(b"RANK=")]
        if rank and parent == run.pid:
            found[int(rank[0])] = int(entry)
    return found


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")


@pytest.mark.slow
@needs_proc
def test_a_lost_process_ends_the_run_with_a_usable_checkpoint(start, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run = start(2, "--epochs", 4000, "--run-dir", folder)
    wait_for(run, (folder / "history.json").is_file)
    os.kill(workers(run)[1], signal.SIGKILL)
    finish(run, status=1)
    epoch = checkpoint.load(folder / "last.pt", resume=True)["epoch"]
    finish(start(0, "--resume", "--run-dir", folder, "--epochs", epoch + 2))
    finish(start(0, "--run-dir", whole, "--epochs", epoch + 2))
    assert_close(folder, whole)


@pytest.mark.slow
@needs_proc
def test_restarted_processes_go_on(start, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run = start(2, "--epochs", 30, "--run-dir", folder, restarts=1)
    wait_for(run, (folder / "history.json").is_file)
    os.kill(workers(run)[1], signal.SIGKILL)
    finish(run)
    finish(start(0, "--run-dir", whole, "--epochs", 30))
    assert len(json.loads((folder / "history.json").read_text())) == 31
    one, two = (json.loads((d / "result.json").read_text()) for d in (folder, whole))
    assert one["test"]["nll"] == pytest.approx(two["test"]["nll"], rel=1e-3)


@pytest.mark.slow
@needs_proc
def test_a_signal_to_one_process_stops_all_at_the_same_step(start, tmp_path):
    folder = tmp_path / "run"
    run = start(2, "--epochs", 4000, "--run-dir", folder)
    # Once an epoch is done: signals are listened to while training.
    history = folder / "history.json"
    wait_for(run, lambda: history.is_file() and len(json.loads(history.read_text())) > 1)
    os.kill(workers(run)[1], signal.SIGTERM)
    _, err = finish(run, status=1)
    assert f"go on with --resume --run-dir {folder}" in err
    checkpoint.load(folder / "last.pt", resume=True)


# ---- the world


def test_one_process_is_a_world_of_its_own():
    assert ALONE.from_first(lambda: 3) == 3
    assert ALONE.first_of(None) is None
    assert ALONE.sum(torch.ones(2)).tolist() == [1, 1]
    with joined(torch.device("cpu")) as world:
        assert world == World()


def test_what_one_process_finds_reaches_the_others():
    error = Diverged("a message", cause="a cause", advice="an advice", step=7)
    function, arguments, state = error.__reduce__()
    copy = function(*arguments)
    copy.__dict__.update(state)
    assert (str(copy), copy.cause, copy.advice, copy.step) == (
        *("a message", "a cause", "an advice", 7),
    )


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    gpu = torch.device("cuda")
    assert local_device(gpu) == gpu
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device(gpu) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match=r"device must be cuda, without a number.*; got cuda:1"):
        local_device(torch.device("cuda", 1))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="nproc-per-node must be at most the 2 GPUs of a machine"):
        local_device(gpu)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
