"""Every runner at a reduced smoke scale, and what is in its result."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from experiment_runs import reproduce, row_of, trained  # noqa: F401

from snf_ext import cli
from snf_ext.experiments import EXPERIMENTS, figures, timed
from snf_ext.experiments.plan import Place
from snf_ext.training import checkpoint, data
from snf_ext.training.evaluate import bits_per_dim
from snf_ext.training.seeds import seeded

DIGIT = 64 * math.log(17)  # nats of a uniform guess


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_ends_with_its_numbers(name, tmp_path):
    small = {"batches": 2, "samples": 2, "warmup": 1, "updates": 3}
    record = reproduce(tmp_path, name, drawn=True, **small)
    experiment = EXPERIMENTS[name]
    assert [row["name"] for row in record["rows"]] == [r.name for r in experiment.rows_of("smoke")]
    assert not record["comparable"]
    assert "means nothing" in record["says"]
    for row in record["rows"]:
        (run,) = row["runs"]
        assert (row["diverged"], row["failed"]) == (0, 0)
        for key, found in row["measures"].items():
            assert found["mean"] == run[key]
            assert math.isfinite(run[key])
            assert found["std"] is None
            if found["paper"] is not None:
                assert found["difference"] == run[key] - found["paper"]
        if "nll" in run:
            assert 0 < run["nll"] < 2 * DIGIT
            assert run["bits_per_dim"] == pytest.approx(bits_per_dim(run["nll"], (1, 8, 8)))
            assert run["epochs"] == row["epochs"] == 1
            saved = tmp_path / name / row["name"] / "seed-0" / "result.json"
            assert saved.is_file()  # the folder is one of snf-ext train's
            assert not list(saved.parent.glob("*.png"))
    assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    where = record["environment"]
    assert where["command"] == f"snf-ext reproduce {name} --scale smoke --seeds 1"
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()


def test_figure2_measures_the_samples_that_it_draws(tmp_path):
    record = reproduce(tmp_path, "figure2", only=["fc-snf"])
    (run,) = row_of(record, "fc-snf")["runs"]
    folder = tmp_path / "figure2" / "fc-snf" / "seed-0"
    content = checkpoint.load(folder / "best.pt")
    flow = cli.build_flow(content["model"]).eval()
    checkpoint.load_weights(flow, content, folder / "best.pt")
    sides = []
    for exact in (True, False):
        with torch.no_grad(), seeded(torch.device("cpu"), 0, "sample"):
            sides.append(flow.sample(figures.SAMPLES, exact=exact).double())
    expected = ((sides[0] - sides[1]) / 16).square().mean().item()
    assert run["difference"] == pytest.approx(expected, rel=1e-12)
    assert run["difference"] > 0
    with np.load(folder / "samples.npz") as kept:
        assert np.array_equal(kept["exact"], sides[0])
        assert int(kept["pixel_levels"]) == 17


def test_figures_3_and_5_keep_their_curves(tmp_path):
    for name, columns in (
        ("figure3", {"epoch", "angle"}),
        ("figure5", {"epoch", "seconds", "val_nll"}),
    ):
        record = reproduce(tmp_path, name, only=["fc-snf"], epochs=3)
        (run,) = row_of(record, "fc-snf")["runs"]
        assert run["history"].keys() == columns
        assert run["history"]["epoch"] == [0, 1, 2, 3]
        for column in columns:
            assert all(math.isfinite(value) for value in run["history"][column])
    assert min(run["history"]["val_nll"]) < run["history"]["val_nll"][0]


def test_figure4_fits_exponents():
    def row(kind, size, time):
        measures = {"batch_ms": {"mean": time}}
        return {
            "settings": {"linear": kind, "features": size},
            "measures": measures,
            "runs": [{}],
        }

    sizes = (32, 800, 896, 1568, 4064)
    square = [row("self_norm", d, 9.0 if d == 32 else 3e-4 * d**2) for d in sizes]
    cube = [row("exact", d, 9.0 if d == 32 else 1e-7 * d**3) for d in sizes]
    fits = figures.exponents(square + cube)
    assert fits["self_norm"]["exponent"] == pytest.approx(2)
    assert fits["exact"]["exponent"] == pytest.approx(3)
    assert (fits["exact"]["first"], fits["exact"]["last"]) == (800, 4064)
    assert fits["exact"]["says"] == "time ~ D^3.00 over D = 800 to 4064"
    few = [row("exact", d, float(d)) for d in (32, 64, 128, 800)]
    assert figures.exponents(few)["exact"]["exponent"] == pytest.approx(1)
    assert figures.exponents(few[:2]) == {}


def test_times_are_medians_of_rounds_in_changing_order(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timed.time, "perf_counter", lambda: clock[0])
    lasts = {"a": itertools.chain([9.0], [0.001, 0.002, 0.003, 0.004, 0.005] * 4)}
    lasts["b"] = itertools.repeat(0.25)

    def call(name):
        order.append(name)
        clock[0] += next(lasts[name])

    calls = {name: lambda name=name: call(name) for name in "ab"}
    times = timed.interleave(calls, torch.device("cpu"), count=20, warmup=1)
    assert times["a"] == pytest.approx({"q1": 2.0, "median": 3.0, "q3": 4.0})
    assert times["b"] == pytest.approx({"q1": 250.0, "median": 250.0, "q3": 250.0})
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 21
    assert set(rounds) == {"ab", "ba"}


def test_a_timed_step_trains_and_a_sample_is_one(monkeypatch):
    built = []

    def build(model):
        built.append(cli.build_flow(model))
        return built[-1]

    taken = []

    def once(calls, device, count, warmup):
        before = [p.clone() for p in built[0].parameters()]
        for call in calls.values():
            call()
        moved = [not torch.equal(a, b) for a, b in zip(before, built[0].parameters(), strict=True)]
        taken.append((count, warmup, built[0].training, all(moved)))
        return {name: {"q1": 1.0, "median": 2.0, "q3": 3.0} for name in calls}

    monkeypatch.setattr(timed, "interleave", once)
    row = next(r for r in EXPERIMENTS["table3"].rows if r.name == "fc-snf").at("smoke")
    (unit,) = EXPERIMENTS["table3"].kind.units([row], 1)
    found = unit.perform(None, Place(torch.device("cpu"), {}, build, False))
    assert taken == [(5, 2, True, True), (5, 2, False, False)]
    assert found["fc-snf"].items() >= {"batch_ms": 2.0, "batch_q1": 1.0, "sample_q3": 3.0}.items()
    assert built[0].recon_weight == 1.0


def test_rows_that_are_timed_in_turn_go_together(tmp_path):
    small = {"batches": 2, "samples": 2, "warmup": 1}
    record = reproduce(tmp_path, "table3", only=["fc-snf"], **small)
    assert [r["name"] for r in record["rows"] if r["runs"]] == ["fc-exact", "fc-relative", "fc-snf"]
    assert len(record["rows"]) == 13


def test_sfm_starts_differ_in_what_actnorm_has_seen(tmp_path):
    record = reproduce(tmp_path, "sfm-figure5", seeds=2)
    one, many = (row_of(record, name)["runs"] for name in ("one-batch", "cumulative"))
    for run in one + many:
        # Three levels of two steps and two split priors.
        assert len(run["largest_outputs_after_one_update"]) == 8
        assert run["largest_output"] == max(run["largest_outputs_after_one_update"])
        assert len(run["bits_per_dim"]) == run["steps"] == 2
    assert {run["seed"] for run in one} == {0, 1}
    assert one[0]["bits_per_dim"] != one[1]["bits_per_dim"]
    assert one[0]["bits_per_dim"] != many[0]["bits_per_dim"]


def test_data_sets_are_loaded_before_the_first_run(tmp_path, monkeypatch, trained):  # noqa: F811
    def missing(*args):
        raise FileNotFoundError("files.npz does not exist")

    monkeypatch.setitem(data.LOADERS, "digits", missing)
    with pytest.raises(FileNotFoundError, match=r"files.npz does not exist"):
        reproduce(tmp_path / "out")
    assert not trained
    assert not (tmp_path / "out").exists()
