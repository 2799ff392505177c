"""zuko's families as models, and of the commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zuko_cases import C, every_family

from snf_ext import cli
from snf_ext.adapters.families import FAMILIES
from snf_ext.models_zuko import autoregressive
from snf_ext.training import data

pytest.importorskip("zuko", reason="zuko is not installed")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", None)


def test_settings_of_another_type_are_one_line():
    """The command line refuses them by itself; a checkpoint's settings may be anything."""
    settings = {"event_shape": [1, 2, 2], "width": 1.5}
    with pytest.raises(cli.UserError, match="the settings of model autoregressive must fit it"):
        cli.build_flow({"name": "autoregressive", "settings": settings})


@every_family
def test_a_training_step_and_samples(family, digits):
    """On digits, at the default width, built as the commands build it."""
    settings = {"event_shape": [1, 8, 8], "pixel_levels": 17, "family": family, "layers": 2}
    flow = cli.build_flow({"name": "autoregressive", "settings": settings})
    images = digits.train[:20]
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    losses = []
    for step in range(3):
        torch.manual_seed(1)  # the same noise: the same objective
        loss = flow.loss(images)
        optimizer.zero_grad()
        loss.backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert step or p.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 400
    assert losses[2] < losses[0]
    flow.eval()
    samples = flow.sample(3)
    assert samples.shape == (3, 1, 8, 8)
    assert ((samples >= 0) & (samples <= 16) & (samples == samples.floor())).all()
    with torch.no_grad():
        assert flow.log_prob(images).shape == (20,)


@every_family
def test_conditional_model(family):
    flow = autoregressive(
        (1, 2, 2), family, layers=2, width=16, context_features=C, pixel_levels=17
    )
    images, context = torch.randint(17, (8, 1, 2, 2)), torch.randn(8, C)
    context.requires_grad_()
    flow.loss(images, context).backward()
    assert context.grad.any()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
    flow.eval()
    assert flow.sample(8, context).shape == images.shape


def test_extreme_images_have_finite_losses():
    images = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255.0)])
    for family in FAMILIES:
        flow = autoregressive((1, 8, 8), family)
        assert torch.isfinite(flow.loss(images)), family


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "mafia"}, "family must be one of made, .*; got 'mafia'"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"context_features": -1}, "context_features must be at least 0; got -1"),
        ({"event_shape": (1, 1, 1)}, r"event_shape must hold at least 2 .* got \[1, 1, 1\]"),
    ],
)
def test_models_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        autoregressive(**arguments)


# ---- Through the commands


@pytest.mark.parametrize("family", ["made", "realnvp", "nsf_coupling"])
def test_commands(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = "train --model autoregressive --limit-train 100 --epochs 1 --no-progress --run-dir run"
    arguments = ["--model-args", f"family={family}", "layers=2", "width=16"]
    assert cli.main([*train.split(), *arguments]) == 0
    trained = capsys.readouterr().out
    assert cli.main(["evaluate", "--checkpoint", "run/best.pt"]) == 0
    evaluated = capsys.readouterr().out
    line = re.search(r"^test NLL: .*$", trained, re.MULTILINE)[0]
    assert line in evaluated
    assert "angle" not in evaluated
    command = ["sample", "--checkpoint", "run/best.pt", "--count", "4", "--out", "out.png"]
    assert cli.main(command) == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_without_zuko_one_line_says_so(tmp_path, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--model", "autoregressive", "--run-dir", "run"]) == 2
    assert capsys.readouterr().err == (
        'snf-ext: zuko is needed here and not installed: pip install "snf_ext[zuko]"\n'
    )
    assert not Path("run").exists()


def test_importing_does_not_import_zuko():
    """Its import changes torch.distributions for everybody in the process."""
    code = (
        "import sys, snf_ext.cli, snf_ext.adapters\nassert not {'zuko', 'pyro'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
