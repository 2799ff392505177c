"""A run that is killed at any moment goes on, and ends with the same bits."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import environment
from training_runs import same_run

COMMAND = [sys.executable, "-m", "snf_ext", "train", "--model", "conv", "--no-progress"]
COMMAND += ["--limit-train", "200", "--epochs", "40", "--angle-every", "4", "--threads", "1"]
COMMAND += ["--model-args", "layers=3", "--monitor-every", "5"]
KILLS = 10


def written(folder: Path) -> dict[str, int]:
    """The files of a run, and when each was written: what changes once a process is under way."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = environment()
    began = time.monotonic()
    subprocess.run([*COMMAND, "--run-dir", whole], check=True, env=env, timeout=600)
    took = time.monotonic() - began
    chance = random.Random(5)
    for kill in range(KILLS):
        before = written(killed)
        run = subprocess.Popen(
            [*COMMAND, "--run-dir", killed, *(["--resume"] if kill else [])], env=env
        )
        # However long it takes to start, and never so late that it ends by itself.
        while written(killed) == before and run.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.06 * took))
        assert run.poll() is None, "a run must still go on when it is killed"
        run.kill()  # SIGKILL
        run.wait()
    subprocess.run([*COMMAND, "--run-dir", killed, "--resume"], env=env, timeout=600, check=True)
    same_run(whole, killed)
    assert (whole / "angles.csv").read_bytes() == (killed / "angles.csv").read_bytes()
