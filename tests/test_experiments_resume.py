"""What is done is kept, what was cut off goes on, what differs is refused."""

from __future__ import annotations

import json
import signal

import pytest
from cli_runs import one_line, run
from experiment_runs import reproduce, row_of, trained  # noqa: F401

from snf_ext import experiments
from snf_ext.experiments import folders
from snf_ext.training import run as training
from snf_ext.training.errors import Diverged, UserError
from snf_ext.training.loop import Trainer

FC = ["fc-exact", "fc-snf"]


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def numbers(record):
    """All but times."""
    return [
        {name: value for name, value in run.items() if name != "seconds"}
        for row in record["rows"]
        for run in row["runs"]
    ]


def test_done_rows_are_not_done_again(tmp_path, trained):  # noqa: F811
    first = reproduce(tmp_path, only=FC, seeds=2)
    assert trained == [("fc", 0), ("fc", 1)] * 2
    before = contents(tmp_path / "table1")
    again = reproduce(tmp_path, only=FC, seeds=2)
    assert len(trained) == 4
    assert contents(tmp_path / "table1") == before
    assert again["rows"] == first["rows"]
    more = reproduce(tmp_path, only=["fc-snf"], seeds=3)  # one seed more, and the other row stays
    assert trained[4:] == [("fc", 2)]
    assert [len(row_of(more, name)["runs"]) for name in (*FC, "glow")] == [2, 3, 0]


def test_the_same_run_in_another_experiment_is_taken_over(tmp_path):
    table = reproduce(tmp_path, only=FC)
    figure = reproduce(tmp_path, "figure5", only=FC)
    for name in FC:
        (one,), (two,) = (row_of(record, name)["runs"] for record in (table, figure))
        assert one["seconds"] == two["seconds"]  # of the same steps
        assert one["nll"] == two["nll"]
        assert two["history"]["seconds"][-1] == two["seconds"]
    other = reproduce(tmp_path, "figure5", only=["conv-snf"])  # nobody has done it
    assert row_of(other, "conv-snf")["runs"][0]["seconds"] > 0
    longer = reproduce(tmp_path / "longer", "figure5", only=FC, epochs=2)
    assert row_of(longer, FC[0])["runs"][0]["epochs"] == 2


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, epoch):
    whole = reproduce(tmp_path / "whole", only=["fc-snf"], epochs=3)
    finish, begin, began = Trainer._finish_epoch, Trainer.begin, []

    def cut(self, row):
        if row["epoch"] == epoch:
            (self.folder / ".best.pt.part").write_bytes(b"half")
            raise KeyboardInterrupt
        finish(self, row)

    def remember(self):
        began.append(self.epoch)
        begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            reproduce(tmp_path / "cut", only=["fc-snf"], epochs=3)
    folder = tmp_path / "cut" / "table1" / "fc-snf" / "seed-0"
    assert (folder / "config.json").is_file()
    assert (folder / "last.pt").is_file() == (epoch > 0)
    monkeypatch.setattr(Trainer, "begin", remember)
    resumed = reproduce(tmp_path / "cut", only=["fc-snf"], epochs=3)
    assert began == ([0] if epoch == 0 else [])  # anew only where there was no checkpoint
    assert numbers(resumed) == numbers(whole)
    assert not list(folder.glob(".*.part"))


def test_killed_while_measuring_or_before_anything(tmp_path, monkeypatch, trained):  # noqa: F811
    folder = tmp_path / "table1" / "fc-snf" / "seed-0"
    folder.mkdir(parents=True)
    (folder / ".settings.json.part").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(training, "measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce(tmp_path, only=["fc-snf"])
    record = reproduce(tmp_path, only=["fc-snf"])
    assert row_of(record, "fc-snf")["runs"][0]["epochs"] == 1
    assert len(trained) == 2


def test_other_settings_in_the_same_folder_are_refused(tmp_path, trained):  # noqa: F811
    reproduce(tmp_path, only=["fc-snf"])
    with pytest.raises(UserError, match=r"epochs must stay 1, as in .*fc-snf/seed-0; got 2"):
        reproduce(tmp_path, only=["fc-snf"], epochs=2)
    with pytest.raises(UserError, match=r"lr must stay 0.0001, as in .*; got 0.5 \(choose anoth"):
        reproduce(tmp_path, only=FC, lr=0.5)
    assert len(trained) == 1  # refused before any run, also of the row that is new
    timed = {"batches": 2, "samples": 2, "warmup": 1}
    reproduce(tmp_path, "table3", only=["fc-snf"], **timed)
    with pytest.raises(UserError, match=r"fc-exact must stay .*'batches': 2.* as in .*table3/fc"):
        reproduce(tmp_path, "table3", only=["fc-snf"], **{**timed, "batches": 3})


def test_a_folder_of_something_else_is_left_alone(tmp_path, trained):  # noqa: F811
    folder = tmp_path / "table1" / "fc-snf" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"seed-0 must be new, empty or of this experiment"):
        reproduce(tmp_path, only=["fc-snf"])
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert not trained


def test_a_damaged_outcome_is_named(tmp_path):
    reproduce(tmp_path, only=["fc-snf"])
    (tmp_path / "table1" / "fc-snf" / "seed-0" / folders.OUTCOME).write_text('{"rows": ')
    with pytest.raises(UserError, match=r"outcome.json must be whole JSON"):
        reproduce(tmp_path, only=["fc-snf"])


def test_a_diverged_run_is_a_result_and_not_repeated(tmp_path, trained):  # noqa: F811
    record = reproduce(tmp_path, "table4", only=["fc-0.1", "fc-1"], lr=1e20)
    assert trained == [("fc", 0), ("fc", 0)]
    row = row_of(record, "fc-0.1")
    assert row["diverged"] == 1
    assert row["measures"]["nll"]["mean"] is None
    assert row["measures"]["nll"]["paper_diverged"]
    assert "training diverged: " in row["runs"][0]["diverged"]
    lines = (tmp_path / "table4.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| SNF FC, λ = 0.1 "))
    assert [cell.strip() for cell in line.split("|")][3:6] == ["-", "-", ""]
    assert any(line.startswith("- fc-0.1, seed 0: training diverged: ") for line in lines)
    assert reproduce(tmp_path, "table4", only=["fc-0.1", "fc-1"], lr=1e20)["rows"] == record["rows"]
    assert len(trained) == 2


def test_one_diverged_seed_does_not_lose_the_others(tmp_path, monkeypatch):
    train = training.train

    def second_diverges(config, *args, **kwargs):
        if config.seed == 1:
            raise Diverged("training diverged: by itself")
        return train(config, *args, **kwargs)

    monkeypatch.setattr(training, "train", second_diverges)
    record = reproduce(tmp_path, only=["fc-snf"], seeds=3)
    row = row_of(record, "fc-snf")
    values = [run["nll"] for run in row["runs"] if "nll" in run]
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert row["measures"]["nll"]["mean"] == pytest.approx(sum(values) / 2, rel=1e-14)
    assert row["measures"]["nll"]["count"] == len(values) == 2
    assert "(1 of 3 diverged)" in (tmp_path / "table1.md").read_text()


def test_a_broken_run_is_tried_again_and_the_others_are_done(tmp_path, monkeypatch, capsys):
    train = training.train

    def no_memory(config, *args, **kwargs):
        if config.seed == 0:
            raise RuntimeError("out of memory")
        return train(config, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", no_memory)
        with pytest.raises(experiments.Failed, match=r"1 runs failed, the first .*out of memory"):
            reproduce(tmp_path, only=["fc-snf"], seeds=2)
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    record = json.loads((tmp_path / "table1.json").read_text())
    row = row_of(record, "fc-snf")
    assert (row["failed"], row["measures"]["nll"]["count"]) == (1, 1)
    assert row["runs"][0]["failed"] == "RuntimeError: out of memory"
    row = row_of(reproduce(tmp_path, only=["fc-snf"], seeds=2), "fc-snf")
    assert (row["failed"], row["measures"]["nll"]["count"]) == (0, 2)


def test_a_signal_ends_the_experiment_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    finish = Trainer._finish_epoch

    def then_stop(self, row):
        finish(self, row)
        if row["epoch"] == 1:
            signal.raise_signal(signal.SIGTERM)

    asked = ["reproduce", "table1", "--scale", "smoke", "--only", *FC, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_epoch", then_stop)
        run(*asked, "--no-progress", status=128 + signal.SIGTERM)
    assert one_line(capsys).endswith("fc-exact/seed-0; the same command goes on from there")
    run(*asked, "--no-progress")
    out = capsys.readouterr().out
    assert "reduced: epochs: 2 in place of 6000" in out
    assert f"results: {tmp_path / 'table1.md'}" in out
    record = json.loads((tmp_path / "table1.json").read_text())
    assert [row_of(record, name)["epochs"] for name in FC] == [2, 2]


def test_results_are_there_after_every_run(tmp_path, monkeypatch):
    train, seen = training.train, []

    def look(*args, **kwargs):
        path = tmp_path / "table1.json"
        done = json.loads(path.read_text())["rows"] if path.is_file() else []
        seen.append([row["name"] for row in done if row["runs"]])
        return train(*args, **kwargs)

    monkeypatch.setattr(training, "train", look)
    reproduce(tmp_path, only=[*FC, "fc-relative"])
    assert seen == [[], ["fc-relative"], ["fc-relative", "fc-exact"]]
