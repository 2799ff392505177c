"""Runs that go back to their last good checkpoint and on with a larger lambda."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
from training_runs import CONFIG, assert_same, new_run, resumed, same_run, trainer

import snf_ext
from snf_ext import cli
from snf_ext.training import checkpoint
from snf_ext.training.config import resolve
from snf_ext.training.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROLLBACK = replace(CONFIG, check_every=5, on_divergence="rollback")


def fragile(run):
    """In epoch 2 and later the last layer's learned inverse explodes, unless lambda holds it."""

    def explode(*_):
        if run.epoch >= 1 and run.flow.recon_weight < 5:
            run.flow.bijections[6].weight_inv.data.mul_(100)

    run.optimizer.register_step_post_hook(explode)
    return run


def rows(folder):
    return checkpoint.load(folder / "last.pt", resume=True)["rollbacks"]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rolled_back")
    assert fragile(new_run(folder, ROLLBACK)).fit()
    return folder


def test_a_run_goes_back_and_on(rolled_back):
    (row,) = rows(rolled_back)
    assert (row["epoch"], row["step"], row["recon_weight"]) == (1, 10, 10.0)
    assert row["cause"].startswith("the relative reconstruction error of bijections.6 (SelfNorm")
    history = json.loads((rolled_back / "history.json").read_text())
    assert [row["epoch"] for row in history] == list(range(6))
    assert [row["step"] for row in history] == [7 * epoch for epoch in range(6)]


def test_it_is_the_run_of_the_larger_lambda_from_there(rolled_back, tmp_path):
    short = replace(ROLLBACK, epochs=1)
    assert new_run(tmp_path, short).fit()
    run = resumed(tmp_path, ROLLBACK)
    run.flow.recon_weight = 10.0
    assert run.fit()
    one, two = (checkpoint.load(folder / "last.pt", True) for folder in (rolled_back, tmp_path))
    for part in ("state", "optimizer"):
        assert_same(one[part], two[part])
    assert two["rollbacks"] == []


@pytest.mark.parametrize("step", [3, 9, 12, 20])
def test_killed_and_resumed_it_has_the_same_bits(rolled_back, tmp_path, step):
    """Before the failure, between it and the next checkpoint, and after that."""
    run = fragile(new_run(tmp_path, ROLLBACK))
    steps = []

    def send(*_):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    run.optimizer.register_step_post_hook(send)
    assert not run.fit()
    assert len(rows(tmp_path)) == (step > 9)
    assert fragile(resumed(tmp_path, ROLLBACK)).fit()
    same_run(rolled_back, tmp_path)


def test_a_rollback_is_told(tmp_path, capsys):
    assert fragile(new_run(tmp_path, replace(ROLLBACK, epochs=2))).fit()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training diverged: the relative reconstruction error of bijections.6 ")
    assert line.endswith(" in step 10; going on from epoch 1 with lambda 10 in place of 1")


def broken(run, epoch):
    """No lambda helps: the loss of the third step after ``epoch`` is not finite."""
    loss, calls = run.flow.loss, []

    def overflow(*args, **options):
        calls.append(run.epoch)
        bad = calls[-1] == epoch and calls.count(epoch) % 3 == 0
        return loss(*args, **options) * (math.nan if bad else 1)

    run.flow.loss = overflow
    return run


@pytest.mark.parametrize("epoch", [0, 2])
def test_what_lambda_cannot_cure_ends(tmp_path, epoch):
    run = broken(new_run(tmp_path, ROLLBACK), epoch)
    step = 7 * epoch + 3
    message = (
        rf"training diverged: the loss is nan in epoch {epoch + 1}, step {step}; .*last.pt .*"
        rf"; 3 rollbacks did not help: lambda 10 after the loss is nan in step {step}, "
        rf"lambda 100 after the loss is nan in step {step}, lambda 1000 after the loss is nan in"
    )
    with pytest.raises(snf_ext.Diverged, match=message):
        run.fit()
    assert [row["recon_weight"] for row in rows(tmp_path)] == [10.0, 100.0, 1000.0]
    content = checkpoint.load(tmp_path / "last.pt", resume=True)
    checkpoint.load_weights(run.flow, content, tmp_path / "last.pt")
    assert content["epoch"] == epoch
    again = broken(resumed(tmp_path, ROLLBACK), epoch)  # it has had its three
    assert again.flow.recon_weight == 1000.0
    with pytest.raises(snf_ext.Diverged, match="3 rollbacks did not help"):
        again.fit()


def test_a_weight_that_is_not_finite_at_the_end_of_an_epoch(tmp_path):
    """Found by the last measurement, not by a step."""
    run = new_run(tmp_path, replace(ROLLBACK, epochs=2, check_every=0))
    steps = []

    def poison(*_):
        steps.append(1)
        if len(steps) == 14:
            run.flow.bijections[6].weight_inv.data[0, 0] = math.nan

    run.optimizer.register_step_post_hook(poison)
    assert run.fit()
    (row,) = rows(tmp_path)
    assert row["cause"] == "the parameter bijections.6.weight_inv is not finite"
    assert (row["epoch"], row["step"]) == (1, 14)


def test_checkpoints_of_earlier_versions_resume(tmp_path):
    assert new_run(tmp_path, replace(CONFIG, epochs=1)).fit()
    content = checkpoint.load(tmp_path / "last.pt", resume=True)
    for part in ("guard", "rollbacks"):
        del content[part]
    checkpoint.save(tmp_path / "last.pt", content)
    run = trainer(tmp_path)
    run.resume(checkpoint.load(tmp_path / "last.pt", resume=True), tmp_path / "last.pt")
    assert (run.rollbacks, run.guard.start) == ([], {})


def test_what_the_guard_knows_is_in_the_checkpoint(tmp_path):
    run = new_run(tmp_path, replace(CONFIG, epochs=1, check_every=0))
    run.guard.start = {"bijections.4": 3.0}
    assert run.fit()
    assert resumed(tmp_path).guard.start == {"bijections.4": 3.0}


def test_a_resumed_run_may_be_guarded_otherwise():
    other = {"check_every": 7, "check_inverse": True, "on_divergence": "rollback"}
    assert resolve(other, CONFIG) == replace(CONFIG, **other)


def test_there_must_be_a_lambda_to_raise():
    with pytest.raises(UserError, match=r"recon_weight must be positive for rollback; got 0\.0"):
        replace(ROLLBACK, recon_weight=0.0)


def test_command_line(tmp_path, capsys):
    folder = tmp_path / "run"
    command = "train --limit-train 50 --epochs 1 --check-every 1 --check-inverse --angle-every 0"
    more = ["--no-progress", "--run-dir", str(folder), "--on-divergence"]
    wild = ["--lr", "1e12", "--warmup-epochs", "0"]
    assert cli.main([*command.split(), *more, "rollback", *wild]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [" in place of " in line for line in lines] == [True] * 3 + [False]
    assert lines[-1].startswith("snf-ext: training diverged: ")
    config = checkpoint.load(folder / "last.pt")["config"]
    assert (config["check_every"], config["check_inverse"]) == (1, True)
