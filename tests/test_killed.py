"""A run that is killed at any moment goes on, and ends with the same bits."""

import random
import subprocess
import sys

import pytest
from cli_runs import environment
from training_runs import same_run

COMMAND = [sys.executable, "-m", "snf_ext", "train", "--model", "conv", "--no-progress"]
COMMAND += ["--limit-train", "200", "--epochs", "40", "--angle-every", "4", "--threads", "1"]
COMMAND += ["--model-args", "layers=3", "--monitor-every", "5"]
KILLS = 10


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = environment()
    subprocess.run([*COMMAND, "--run-dir", whole], check=True, env=env, timeout=300)
    chance, kills = random.Random(5), 0
    while kills < KILLS:
        run = subprocess.Popen(
            [*COMMAND, "--run-dir", killed, *(["--resume"] if killed.exists() else [])],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            run.communicate(timeout=chance.uniform(2.0, 7.0))
        except subprocess.TimeoutExpired:
            run.kill()  # SIGKILL
            run.communicate()
            kills += 1
        else:
            break
    done = subprocess.run(
        [*COMMAND, "--run-dir", killed, "--resume"], env=env, timeout=300, check=True
    )
    assert done.returncode == 0
    assert kills == KILLS, "the run was too short to be killed"
    same_run(whole, killed)
    assert (whole / "angles.csv").read_bytes() == (killed / "angles.csv").read_bytes()
