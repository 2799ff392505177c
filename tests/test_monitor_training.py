"""Runs that are monitored: the same training, and rows that survive whatever ends it."""

import csv
import math
import os
import signal
from dataclasses import replace

import pytest
from training_runs import CONFIG, new_run, resumed, same_run

from snf_ext import cli
from snf_ext.training import checkpoint
from snf_ext.training.angle_log import AngleLog
from snf_ext.training.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
MONITORED = replace(CONFIG, monitor_every=3)
STEPS = list(range(3, 36, 3))


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    """A run that was never interrupted, and the angles that its monitor had after each step."""
    folder = tmp_path_factory.mktemp("monitored")
    run, seen = new_run(folder, MONITORED), []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(dict(run.monitor.angles)))
    assert run.fit()
    return folder, seen


def table(folder):
    with open(folder / "angles.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "tensorboard" / "steps"))
    log.Reload()
    return {
        tag.removeprefix("step_angle/"): [(event.step, event.value) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
    }


def test_training_does_not_notice(monitored, tmp_path):
    assert new_run(tmp_path).fit()
    assert not (tmp_path / "angles.csv").exists()
    assert not (tmp_path / "tensorboard" / "steps").exists()
    for source, name in ((tmp_path, "plain"), (monitored[0], "watched")):
        (tmp_path / name).mkdir()
        for file in ("last.pt", "best.pt"):
            content = checkpoint.load(source / file)
            assert content["config"].pop("monitor_every") == (3 if name == "watched" else 0)
            checkpoint.save(tmp_path / name / file, content)
    same_run(tmp_path / "plain", tmp_path / "watched")


def test_the_rows_are_those_of_the_steps(monitored):
    folder, seen = monitored
    rows = table(folder)
    names = ["bijections.4", "bijections.6"]
    assert list(rows[0]) == ["step", "mean", *names]
    assert [int(row["step"]) for row in rows] == STEPS
    assert len(seen) == 35
    for row in rows:
        angles = seen[int(row["step"]) - 1]
        assert {name: float(row[name]) for name in names} == pytest.approx(angles, rel=1e-6)
        assert float(row["mean"]) == pytest.approx(sum(angles.values()) / 2, rel=1e-6)
    assert seen[1] == {}
    assert seen[2] != seen[5]
    logged = scalars(folder)
    assert set(logged) == {"mean", *names}
    for name, events in logged.items():
        assert events == [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows]


def test_a_signal_and_a_resume_leave_no_trace(monitored, tmp_path):
    run = new_run(tmp_path, MONITORED)
    steps = []

    def send(*_):
        steps.append(1)
        if len(steps) == 20:  # epoch 3, after the measurements of steps 15 and 18
            os.kill(os.getpid(), signal.SIGTERM)

    run.optimizer.register_step_post_hook(send)
    assert not run.fit()
    assert [int(row["step"]) for row in table(tmp_path)] == STEPS[:4]
    assert resumed(tmp_path, MONITORED).fit()
    same_run(monitored[0], tmp_path)
    assert (tmp_path / "angles.csv").read_bytes() == (monitored[0] / "angles.csv").read_bytes()
    assert scalars(tmp_path) == scalars(monitored[0])


@pytest.mark.parametrize("lost", ["last.pt", "angles.csv"])
def test_cut_off_between_two_files(monitored, tmp_path, monkeypatch, lost):
    run, replace = new_run(tmp_path, MONITORED), os.replace

    def die(source, target):
        if run.epoch == 3 and str(target).endswith(lost):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    assert resumed(tmp_path, MONITORED).fit()
    same_run(monitored[0], tmp_path)
    assert (tmp_path / "angles.csv").read_bytes() == (monitored[0] / "angles.csv").read_bytes()


def test_a_resumed_run_may_monitor_otherwise(tmp_path):
    assert new_run(tmp_path, replace(MONITORED, epochs=2)).fit()
    assert resumed(tmp_path, replace(MONITORED, epochs=3, monitor_every=0)).fit()
    assert resumed(tmp_path, replace(MONITORED, epochs=4, monitor_every=7)).fit()
    assert [int(row["step"]) for row in table(tmp_path)] == [3, 6, 9, 12, 28]


def test_rows_of_other_layers_keep_their_places(tmp_path):
    log = AngleLog(tmp_path / "angles.csv")
    log.add(1, {"a": 1.0})
    log.write()
    log = AngleLog(tmp_path / "angles.csv", done=1)
    log.add(2, {"a": 2.0, "b": math.nan})
    log.write()
    text = (tmp_path / "angles.csv").read_text()
    assert text == "step,mean,a,b\n1,1,1,\n2,nan,2,nan\n"
    (tmp_path / "angles.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"angles\.csv must have a column step of whole numbers"):
        AngleLog(tmp_path / "angles.csv")


def test_command_line(tmp_path, capsys):
    command = ["train", "--model", "fc", "--epochs", "2", "--limit-train", "300"]
    folder = tmp_path / "run"
    monitor = [*command, "--angle-every", "0", "--run-dir", str(folder), "--monitor-every"]
    assert cli.main([*monitor, "2"]) == 0
    assert "step_angle" in capsys.readouterr().err
    rows = table(folder)
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert all(0 < float(row["mean"]) < 90 for row in rows)
    assert cli.main([*command, "--monitor-every", "-1"]) == 2
    assert "monitor_every must be at least 0; got -1" in capsys.readouterr().err
