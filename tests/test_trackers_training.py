"""Training with trackers: the rows of the history reach them, once, and change nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import QUICK, one_line, run
from fake_trackers import fake_servers
from training_runs import CONFIG, assert_same, new_run, resumed

from snf_ext import cli
from snf_ext.cli_options import Train
from snf_ext.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TRACKED = replace(CONFIG, track=("wandb", "mlflow"), monitor_every=3)


@pytest.fixture
def servers(monkeypatch):
    return fake_servers(monkeypatch)


def logged(server):
    """Of the only run: rows by step, and numbers of steps by step."""
    (only,) = server.runs.values()
    rows = [(step, values) for step, values in only["log"] if "epoch" in values]
    steps = [(step, values) for step, values in only["log"] if "epoch" not in values]
    return rows, steps


def wanted(history):
    return [
        (row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})
        for row in history
    ]


def test_a_run_and_its_resumption(tmp_path, servers):
    assert new_run(tmp_path, replace(TRACKED, epochs=2)).fit()
    second = resumed(tmp_path, TRACKED)
    assert second.fit()
    assert [row["epoch"] for row in second.history] == [0, 1, 2, 3, 4, 5]
    for server in servers.values():
        rows, steps = logged(server)
        assert rows == wanted(second.history)
        assert [step for step, _ in steps] == list(range(3, 36, 3))
        assert all("step_angle/mean" in values for _, values in steps)
    assert servers["wandb"].runs["run0"]["settings"][0]["batch_size"] == CONFIG.batch_size


def test_training_does_not_notice(tmp_path, servers):
    for name, config in (("a", CONFIG), ("b", replace(CONFIG, track=TRACKED.track))):
        assert new_run(tmp_path / name, config).fit()
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("a", "b"))
    assert two["config"].pop("track") == TRACKED.track
    assert one["config"].pop("track") == ()
    for content in (one, two):
        for row in content["history"]:
            del row["seconds"]
    assert_same(one, two)


def test_a_step_that_raises_closes_them(tmp_path, servers, monkeypatch):
    trainer = new_run(tmp_path, TRACKED)

    def fail(*args, **kwargs):
        raise MemoryError("none left")

    monkeypatch.setattr(trainer.flow, "loss", fail)
    with pytest.raises(MemoryError, match="none left"):
        trainer.fit()
    assert servers["wandb"].runs["run0"]["ended"] == [1]
    assert servers["mlflow"].runs["run0"]["ended"] == ["FAILED"]


@pytest.mark.usefixtures("in_own_folder")
class TestCommand:
    @pytest.mark.parametrize("name", TRACKED.track)
    def test_a_missing_package(self, capsys, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        run(*QUICK, "--track", name, "--run-dir", "a", status=2)
        line = one_line(capsys)
        assert line == (
            f"snf-ext: --track {name} needs a package that is not installed: pip install {name}"
        )
        assert not Path("a").exists()

    def test_a_run_that_goes_on_keeps_its_own(self):
        config = cli._config(Train(track=("wandb",)), None)
        assert config.track == ("wandb",)
        earlier = {"config": config.to_dict(), "epoch": 1}
        assert cli._config(Train(), earlier).track == ("wandb",)
        assert cli._config(Train(track=("mlflow",)), earlier).track == ("mlflow",)
