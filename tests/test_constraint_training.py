"""Runs with controllers: they are resumed whole, their rows are right, and the command has them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from training_runs import CONFIG, DATA, SHAPE, Trainer, same_run

import snf_ext
from snf_ext import cli
from snf_ext.constraint import controllers
from snf_ext.controllers import CONTROLLERS, KAPPA
from snf_ext.training import checkpoint
from snf_ext.training.config import Config, resolve
from snf_ext.training.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, epochs=4):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    flow = snf_ext.constrain(snf_ext.models.fc(SHAPE, pixel_levels=17), snf_ext.Relative(1e-3))
    config = Config.from_dict(CONFIG.to_dict() | {"epochs": epochs, "angle_every": 0})
    model = {"name": "fc", "settings": {}}
    return Trainer(flow, model, DATA, config, folder, progress=False)


def test_a_resumed_run_has_the_same_bits_and_rows(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.begin()
    assert whole.fit()
    held = controllers(whole.flow).values()
    rows = whole.history
    assert (rows[0]["recon_weight"], rows[0]["relative_error"]) == (1.0, None)
    assert rows[-1]["recon_weight"] == pytest.approx(sum(c.recon_weight.item() for c in held) / 2)
    assert rows[-1]["relative_error"] == pytest.approx(sum(c.error.item() for c in held) / 2)
    assert len({row["recon_weight"] for row in rows}) == 5
    first = trainer(tmp_path / "parts", epochs=2)
    first.begin()
    assert first.fit()
    second = trainer(tmp_path / "parts")
    path = tmp_path / "parts" / "last.pt"
    second.resume(checkpoint.load(path, resume=True), path)
    assert second.fit()
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_rows_without_controllers_are_as_before(tmp_path):
    torch.manual_seed(0)
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17)
    run = Trainer(flow, {"name": "fc", "settings": {}}, DATA, CONFIG, tmp_path, progress=False)
    run.begin()
    assert not {"recon_weight", "relative_error"} & set(run.history[0])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--epochs", "2", "--limit-train", "200", "--no-progress"]
    command += ["--angle-every", "0", "--run-dir", "run"]
    assert cli.main([*command, "--controller", "relative", "--kappa", "0.05"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["controller"], config["kappa"], config["recon_weight"]) == (
        ("relative", 0.05, 1.0)  # not the 10 of a fixed one
    )
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert all(math.isfinite(row["recon_weight"]) for row in history)
    content = checkpoint.load(tmp_path / "run" / "last.pt", resume=True)
    flow = cli.build_flow(content["model"])
    flow.load_state_dict(content["state"])
    held = controllers(flow).values()
    assert {type(c) for c in held} == {snf_ext.Relative}
    assert {c.kappa for c in held} == {0.05}
    weights = [c.recon_weight.item() for c in held]
    assert history[-1]["recon_weight"] == pytest.approx(sum(weights) / 2)
    assert flow.recon_weight == 1
    capsys.readouterr()
    assert cli.main(["evaluate", "--checkpoint", "run/best.pt"]) == 0
    assert cli.main([*command, "--resume", "--kappa", "0.5"]) == 2
    assert "kappa must stay 0.05 when a run is resumed; got 0.5" in capsys.readouterr().err
    command[2] = "3"
    assert cli.main([*command, "--resume"]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history) == 4


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_every_name_builds(name):
    settings = {"kappa": 0.5, "recon_weight": 2.0}
    model = {"name": "fc", "settings": {"event_shape": SHAPE}}
    flow = cli.build_flow(model | {"controller": {"name": name, "settings": settings}})
    assert {type(c) for c in controllers(flow).values()} == {CONTROLLERS[name]}


def test_defaults_and_what_is_asked_for():
    asked = {"model": "glow", "data": "mnist", "controller": "geco"}
    config = resolve(asked)
    assert (config.kappa, config.recon_weight) == (KAPPA, 1.0)
    assert resolve(asked | {"kappa": 0.5, "recon_weight": 0.01}).recon_weight == 0.01
    plain = resolve({"model": "glow", "data": "mnist"})
    assert (plain.controller, plain.kappa, plain.recon_weight) == (None, None, 100.0)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"controller": "pid"}, "controller must be one of relative, geco, .*; got pid"),
        ({"kappa": 0.1}, "kappa must be left out without a controller; got 0.1"),
        ({"controller": "geco", "kappa": -1.0}, "kappa must be positive and finite .*; got -1.0"),
        (
            {"controller": "geco", "kappa": math.inf},
            "kappa must be positive and finite .*; got inf",
        ),
        ({"controller": "geco"}, "kappa must be positive and finite with a controller; got None"),
    ],
)
def test_settings_out_of_range(settings, rule):
    with pytest.raises(UserError, match=rule):
        Config.from_dict(CONFIG.to_dict() | settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kappa", "0.1"], "kappa must be left out without a controller; got 0.1"),
        (
            ["--controller", "relative", "--recon-weight", "0"],
            "recon_weight must lie in the bounds",
        ),
        (
            ["--controller", "relative", "--model-args", "linear=exact"],
            "flow must have a layer whose inverse is trained by the penalty, not tracked; got none",
        ),
    ],
)
def test_the_command_with_what_does_not_fit(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--epochs", "1", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
