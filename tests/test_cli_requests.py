"""Requests that cannot be met: one line, status 2, nothing written. Help and missing packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import QUICK, environment, one_line, run

from snf_ext import cli
from snf_ext.training import checkpoint

pytestmark = pytest.mark.usefixtures("in_own_folder")

BAD = {
    "no data folder": ("train --data mnist", "--data mnist needs --data-dir"),
    "data folder": ("train --data mnist --data-dir nope", "nope does not exist; --data-dir must"),
    "data files": ("train --data mnist --data-dir .", "train-images-idx3-ubyte does not exist"),
    "images": ("train --data images --data-dir full", "full must hold one .npz file, or"),
    "npz": (
        "train --data images --data-dir full/file",
        "full/file must be a whole .npz file of plain arrays; got BadZipFile",
    ),
    "penalty": ("train --log-det-penalty -1", "log_det_penalty must be finite, not negative"),
    "actnorm": ("train --actnorm-batches 0", "actnorm_batches must be at least 1; got 0"),
    "limit": ("train --limit-train 9999", r"limit_train must lie in 1\.\.1197; got 9999"),
    "lr": ("train --lr -1", "lr must be positive and finite; got -1"),
    "epochs": ("train --epochs 0", "epochs must be at least 1; got 0"),
    "threads": ("train --threads 0", "threads must be at least 1; got 0"),
    "device": ("train --device tpu", "device must be cpu, cuda, cuda:N or auto; got 'tpu'"),
    "no such gpu": ("train --device cuda:99", "device cuda:99 is not there; this machine offers"),
    "argument name": (
        "train --model-args depth=3",
        "NAME one of layers, linear, inverse, debias; got 'depth=3'",
    ),
    "argument form": ("train --model-args layers", "must be NAME=VALUE, .*; got 'layers'"),
    "argument type": ("train --model-args layers=two", "layers must be of type int; got 'two'"),
    "argument range": ("train --model-args layers=0", "layers must be at least 1; got 0"),
    "argument choice": ("train --model-args linear=x", "linear must be one of .*; got 'x'"),
    "resume what": ("train --resume", "--resume needs --run-dir"),
    "nothing to resume": ("train --resume --run-dir nope", "there is nothing to resume"),
    "folder": ("train --run-dir full", "run folder full must be new or empty; .* --resume"),
    "file as folder": ("train --run-dir full/file", "run folder full/file must be writable"),
    "file in the way": ("train --run-dir full/file/a", "run folder full/file/a must be writable"),
    "no checkpoint": ("evaluate --checkpoint nope.pt", "nope.pt does not exist; a checkpoint must"),
    "bad checkpoint": ("evaluate --checkpoint full/file", "full/file must be a checkpoint of snf"),
    "noise": (
        "evaluate --checkpoint full/file --noise 0",
        "noise must be positive and finite; got 0.0",
    ),
    "endless noise": (
        "evaluate --checkpoint full/file --noise inf",
        "noise must be positive and finite; got inf",
    ),
    "sample of what": ("sample --checkpoint full/file", "full/file must be a checkpoint of snf"),
    "count": ("sample --checkpoint full/file --count 0", "count must be at least 1; got 0"),
    "temperature": (
        "sample --checkpoint full/file --temperature nan",
        "temperature must be positive and finite; got nan",
    ),
    "refine": ("sample --checkpoint full/file --refine -1", "refine must be at least 0; got -1"),
    "refine what": (
        "sample --checkpoint full/file --refine 2 --exact",
        "refine must be left out with --exact; got 2",
    ),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_requests(tmp_path, capsys, argv, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something")
    before = sorted(tmp_path.rglob("*"))
    run(*argv.split(), status=2)
    line = one_line(capsys)
    assert line.startswith("snf-ext: ")
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    run("train", "--run-dir", tmp_path / "locked", status=2)
    assert "locked must be writable; Permission denied" in one_line(capsys)
    assert not list((tmp_path / "locked").iterdir())


def test_resume_refuses_another_run(trained, capsys):
    folder = trained[0]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for argv, message in {
        "--lr 0.5": r"lr must stay 0\.001 when a run is resumed; got 0\.5",
        "--seed 1": "seed must stay 0 when a run is resumed; got 1",
        "--batch-size 7": "batch_size must stay 100",
        "--data mnist": "data must stay 'digits'",
        "--no-shuffle": "shuffle must stay True",
        "--limit-train 5": "limit_train must stay None",
        "--model-args layers=3": r"model_args must stay {'inverse': 'tracked'}",
        "--optimizer radam": "optimizer must stay 'adam'",
        "--objective bits": "objective must stay 'nats'",
        "--log-det-penalty 1": r"log_det_penalty must stay 0\.0",
        "--conditional": "conditional must stay False",
        "--epochs 5": "epochs must be at least the 40 that are done; got 5",
    }.items():
        run("train", "--resume", "--run-dir", folder, *argv.split(), status=2)
        assert re.search(message, one_line(capsys))
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_data_that_do_not_fit_the_checkpoint(trained, capsys, monkeypatch):
    from snf_ext.training import data

    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    other = data.Dataset("mnist", images, images, images, (1, 28, 28), 256)
    monkeypatch.setitem(data.LOADERS, "mnist", lambda folder, labels: other)
    run("evaluate", "--checkpoint", trained[0] / "best.pt", "--data", "mnist", status=2)
    assert "must have events (1, 8, 8) of 17 levels" in one_line(capsys)


def test_a_disk_that_fills_up_is_told_in_one_line(capsys, monkeypatch):
    save, count = torch.save, []

    def full(content, file):
        count.append(1)
        if len(count) == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    run(*QUICK, "--epochs", "9", "--run-dir", "a", status=2)
    assert "No space left on device" in one_line(capsys)
    assert not list(Path("a").glob(".*"))
    assert checkpoint.load(Path("a/last.pt"), resume=True)["epoch"] == 0


@pytest.mark.parametrize("argv", ["train --colour red", "paint", "train --model unheard-of"])
def test_unknown_words(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv.split())
    assert stopped.value.code == 2
    assert argv.split()[-1 if "paint" in argv else 1] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train", "evaluate", "sample"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert ("--checkpoint" if command in ("evaluate", "sample") else "train") in out


@pytest.mark.parametrize("module", ["tyro", "ignite", "sklearn", "matplotlib", "tensorboard"])
def test_a_missing_extra_names_the_command(capsys, monkeypatch, module):
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    run("train", "--epochs", "1", "--run-dir", "a", status=2)
    line = one_line(capsys)
    assert line == (
        f'snf-ext: {module} is needed here and not installed: pip install "snf_ext[train]"'
    )
    assert not Path("a").exists()


def test_importing_needs_torch_alone():
    """Everything but the commands themselves works without the extra."""
    code = """
import sys
extra = {"ignite", "tqdm", "tyro", "tensorboard", "matplotlib", "sklearn", "scipy", "PIL"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extra:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
import snf_ext.cli
from snf_ext.training.angle import gradient_angle
from snf_ext.training.evaluate import evaluate
flow = snf_ext.models.fc((1, 2, 2))
images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
print(len(gradient_angle(flow, images)), evaluate(flow, images).images)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "3"]
