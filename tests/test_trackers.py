"""Where a run's numbers go: what reaches TensorBoard's files, wandb and MLflow, and when."""

from __future__ import annotations

import importlib
import json
import sys
import types
import warnings

import pytest
from fake_trackers import fake_servers

from snf_ext.training.errors import UserError
from snf_ext.training.trackers import TRACKERS, Trackers, check_trackers

SETTINGS = {"lr": 0.5, "clip_norm": None, "model_args": {"layers": 2}}
BOTH = ("wandb", "mlflow")


@pytest.fixture
def servers(monkeypatch):
    """Both packages replaced; a server of each by name."""
    return fake_servers(monkeypatch)


def row(epoch):
    loss = None if epoch == 0 else 1.5 / epoch
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "val_nll": 8.0 - epoch}


def rows(last):
    return [row(epoch) for epoch in range(last + 1)]


def sent(epoch):
    """What a tracker gets of a row."""
    values = {"epoch": epoch, "val_nll": 8.0 - epoch}
    return (10 * epoch, values if epoch == 0 else values | {"train_loss": 1.5 / epoch})


def run_epochs(folder, names, first, last, steps=False):
    """Epochs first .. last of a run, those before being in its history."""
    with Trackers(folder, names, SETTINGS, rows(first - 1), steps) as trackers:
        for epoch in range(first, last + 1):
            if steps:
                values = {"step_angle/mean": float(epoch), "step_angle/none": None}
                trackers.log_step(values, 10 * epoch - 5)
            trackers.log(row(epoch))


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    return {
        tag: [(event.step, event.value) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
    }


def logged(server):
    (run,) = server.runs.values()
    return run["log"]


def test_tensorboard_files(tmp_path):
    run_epochs(tmp_path, (), 1, 2, steps=True)
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard"}
    assert scalars(tmp_path / "tensorboard") == {
        "val_nll": [(0, 8.0), (1, 7.0), (2, 6.0)],
        "train_loss": [(1, 1.5), (2, 0.75)],
    }
    assert scalars(tmp_path / "tensorboard" / "steps") == {"step_angle/mean": [(5, 1.0), (15, 2.0)]}


def test_tensorboard_hides_what_is_done_again(tmp_path):
    with Trackers(tmp_path, (), SETTINGS, rows(0), steps=True) as trackers:
        trackers.log(row(1))
        trackers.log_step({"step_angle/mean": 100.0}, 15)
        trackers.log({**row(2), "val_nll": 100.0})  # cut off before its checkpoint
    run_epochs(tmp_path, (), 2, 3, steps=True)
    found = scalars(tmp_path / "tensorboard")
    assert found["val_nll"] == [(0, 8.0), (1, 7.0), (2, 6.0), (3, 5.0)]
    assert scalars(tmp_path / "tensorboard" / "steps") == {
        "step_angle/mean": [(15, 2.0), (25, 3.0)]
    }


def test_without_steps_there_is_no_file_of_them(tmp_path):
    run_epochs(tmp_path, (), 1, 1)
    assert not (tmp_path / "tensorboard" / "steps").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_what_reaches_a_tracker(tmp_path, servers, name):
    run_epochs(tmp_path, (name,), 1, 2, steps=True)
    step = [(10 * epoch - 5, {"step_angle/mean": float(epoch)}) for epoch in (1, 2)]
    assert logged(servers[name]) == [sent(0), step[0], sent(1), step[1], sent(2)]
    assert scalars(tmp_path / "tensorboard")["val_nll"] == [(0, 8.0), (1, 7.0), (2, 6.0)]


def test_settings_and_places(tmp_path, servers):
    run_epochs(tmp_path, BOTH, 1, 1)
    wandb, mlflow = (servers[name].runs["run0"] for name in BOTH)
    assert wandb["settings"] == [SETTINGS]
    assert mlflow["settings"] == [{"lr": 0.5, "clip_norm": None, "model_args.layers": 2}]
    (call,) = servers["wandb"].calls
    assert (call["dir"], call["name"]) == (str(tmp_path), tmp_path.name)
    assert call["project"] == "snf_ext"
    (call,) = servers["mlflow"].calls
    assert call == {"uri": f"sqlite:///{tmp_path}/mlflow.db", "run_name": tmp_path.name}
    assert sys.modules["mlflow"].uri is None  # the caller's, again


def test_places_that_the_user_chose(tmp_path, servers, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sys.modules["mlflow"].uri = "http://tracking"
    run_epochs(tmp_path, BOTH, 1, 1)
    assert servers["wandb"].calls[0]["project"] == "mine"
    assert servers["mlflow"].calls[0]["uri"] == "http://tracking"
    assert sys.modules["mlflow"].uri == "http://tracking"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_goes_on_in_the_same(tmp_path, servers, name):
    run_epochs(tmp_path, (name,), 1, 2)
    record = {name: {"run": "run0", "epoch": 2}}
    assert json.loads((tmp_path / "trackers.json").read_text()) == record
    run_epochs(tmp_path, (name,), 3, 4)
    assert logged(servers[name]) == [sent(epoch) for epoch in range(5)]  # none of them twice
    assert len(servers[name].runs["run0"]["ended"]) == 2


@pytest.mark.parametrize("name", TRACKERS)
def test_numbers_of_an_epoch_without_checkpoint_are_not_sent(tmp_path, servers, name):
    with Trackers(tmp_path, (name,), SETTINGS, rows(0), steps=True) as trackers:
        trackers.log_step({"step_angle/mean": 100.0}, 5)  # and then it is cut off
    run_epochs(tmp_path, (name,), 1, 1, steps=True)
    assert logged(servers[name]) == [sent(0), (5, {"step_angle/mean": 1.0}), sent(1)]


def test_a_new_tracker_gets_the_whole_history(tmp_path, servers):
    run_epochs(tmp_path, ("wandb",), 1, 2)
    run_epochs(tmp_path, BOTH, 3, 3)
    for name in BOTH:
        assert logged(servers[name]) == [sent(epoch) for epoch in range(4)]


def test_a_row_that_was_cut_off_on_its_way_is_sent(tmp_path, servers):
    run_epochs(tmp_path, ("mlflow",), 1, 1)  # epoch 2 reaches a checkpoint, and no tracker
    run_epochs(tmp_path, ("mlflow",), 3, 3)
    assert logged(servers["mlflow"]) == [sent(epoch) for epoch in range(4)]


def log_and_raise(trackers, error):
    trackers.log(row(1))
    raise error


def test_an_exception_closes_all(tmp_path, servers):
    trackers = Trackers(tmp_path, BOTH, SETTINGS, rows(0))
    with pytest.raises(KeyError, match="boom"), trackers:
        log_and_raise(trackers, KeyError("boom"))
    assert servers["wandb"].runs["run0"]["ended"] == [1]
    assert servers["mlflow"].runs["run0"]["ended"] == ["FAILED"]
    assert sys.modules["mlflow"].uri is None
    assert scalars(tmp_path / "tensorboard")["val_nll"] == [(0, 8.0), (1, 7.0)]


def test_the_normal_end_closes_all(tmp_path, servers):
    run_epochs(tmp_path, BOTH, 1, 1)
    assert servers["wandb"].runs["run0"]["ended"] == [0]
    assert servers["mlflow"].runs["run0"]["ended"] == ["FINISHED"]


def test_one_that_cannot_be_opened_closes_those_before_it(tmp_path, servers):
    record = {"mlflow": {"run": "lost", "epoch": 1}}
    (tmp_path / "trackers.json").write_text(json.dumps(record))
    with (
        pytest.raises(UserError, match=r"mlflow cannot be opened with its run lost; .*not found"),
        Trackers(tmp_path, BOTH, SETTINGS, rows(1)),
    ):
        pytest.fail("entered")
    assert servers["wandb"].runs["run0"]["ended"] == [1]
    assert sys.modules["mlflow"].uri is None


def test_training_goes_on_where_a_tracker_fails(tmp_path, servers):
    server = servers["mlflow"]
    with Trackers(tmp_path, ("mlflow",), SETTINGS, rows(0)) as trackers:
        server.broken = OSError("no route")
        with pytest.warns(RuntimeWarning, match=r"mlflow could not take .*: no route"):
            trackers.log(row(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was said once
            trackers.log(row(2))
        assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"]["epoch"] == 0
        server.broken = None
        trackers.log(row(3))
    assert logged(server) == [sent(epoch) for epoch in range(4)]


def test_an_end_that_fails_is_a_warning(tmp_path, servers, monkeypatch):
    def refuse(exit_code=0):
        raise OSError("no route")

    monkeypatch.setattr(sys.modules["wandb"], "finish", refuse)
    with pytest.warns(RuntimeWarning, match="wandb could not be closed: no route"):
        run_epochs(tmp_path, BOTH, 1, 1)
    assert servers["mlflow"].runs["run0"]["ended"] == ["FINISHED"]


def test_a_run_of_the_caller_is_left_open(tmp_path, servers):
    mlflow = sys.modules["mlflow"]
    mlflow.start_run()
    run_epochs(tmp_path, ("mlflow",), 1, 1)
    assert mlflow.active_run().info.run_id == "run0"
    assert servers["mlflow"].runs["run0"]["log"] == []
    assert servers["mlflow"].runs["run1"]["log"] == [sent(0), sent(1)]


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("there", [None, types.ModuleType("a_mere_folder")])
def test_a_missing_package(tmp_path, monkeypatch, name, there):
    if there is not None:
        monkeypatch.setattr(there, "__file__", None, raising=False)
    monkeypatch.setitem(sys.modules, name, there)
    with pytest.raises(UserError, match=f"--track {name} needs .*: pip install {name}$"):
        Trackers(tmp_path, (name,), SETTINGS, rows(0))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_lacks_another(monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(UserError, match=r"mlflow cannot load its package; .*'pandas'"):
        check_trackers(("mlflow",))


def test_an_unknown_tracker():
    with pytest.raises(UserError, match=r"track must be of wandb, mlflow; got 'paper'"):
        check_trackers(("paper",))


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": {"run": "a"}}', '{"wandb": 3}'])
def test_a_damaged_record(tmp_path, servers, text):
    (tmp_path / "trackers.json").write_text(text)
    with (
        pytest.raises(UserError, match=r"trackers\.json must have a run and an epoch"),
        Trackers(tmp_path, ("wandb",), SETTINGS, rows(0)),
    ):
        pytest.fail("entered")
    assert servers["wandb"].runs == {}
