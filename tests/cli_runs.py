"""The commands as the tests call them, and a run of the main job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snf_ext import cli

QUICK = ["train", "--model", "fc", "--no-progress", "--angle-every", "0"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv, status=0):
    assert cli.main([str(argument) for argument in argv]) == status


def one_line(capsys):
    """The single line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short run of the main job and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-m", "snf_ext", "train", "--model", "fc", "--epochs", "40"]
    done = subprocess.run(
        [*command, "--run-dir", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return folder, done


def environment():
    """This checkout first, whatever is installed."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
