"""Mean, deviation and difference by hand; the page says what the JSON says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from snf_ext.experiments import EXPERIMENTS, draw, report, summary

TABLE1 = EXPERIMENTS["table1"]
RUNS = {
    "fc-exact": [
        {"seed": s, "nll": v, "epochs": 6000, "seconds": 9.0}
        for s, v in enumerate((950.0, 947.0, 944.0))
    ],
    "fc-snf": [{"seed": 0, "nll": 947.5, "epochs": 6000, "seconds": 8.0}],
    "fc-relative": [{"seed": 0, "diverged": "training diverged: lost"}],
    "conv-snf": [{"seed": 0, "failed": "RuntimeError: no"}],
    "fc-tracked": [{"seed": 0, "nll": 946.0, "epochs": 6000, "seconds": 8.0}],
}
WHERE = {
    "command": "snf-ext reproduce table1",
    "date": "2026-01-02T03:04:05",
    "machine": "a machine",
    "threads": 2,
    "snf_ext": "1",
    "backend": "native",
    "torch": "2",
    "python": "3",
    "commit": None,
}


def record(scale="full", experiment=TABLE1, runs=RUNS, name="table1"):
    return {**summary.record(name, experiment, scale, 3, runs), "environment": WHERE}


def measured(found, name, key="nll"):
    return next(row for row in found["rows"] if row["name"] == name)["measures"][key]


def cells(page):
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}


def test_mean_deviation_and_difference():
    found = measured(record(), "fc-exact")
    assert found["mean"] == 947.0
    assert found["std"] == 3.0  # sqrt((9 + 0 + 9) / 2)
    assert found["difference"] == pytest.approx(947.0 - 947.6)
    assert (found["paper"], found["paper_std"]) == (947.6, 0.2)
    alone = measured(record(), "fc-snf")
    assert (alone["mean"], alone["std"]) == (947.5, None)
    assert measured(record(), "fc-relative")["difference"] is None


def test_the_page_says_what_the_record_says():
    page = report.markdown(record())
    found = cells(page)
    assert found["Exact gradient FC"] == {
        "row": "Exact gradient FC",
        "unit": "nats",
        "paper": "947.6 ± 0.2",
        "here": "947.0 ± 3.0",
        "difference": "-0.6",
        "runs": "3 of 3",
        "epochs": "6000",
        "seconds a run": "9.0",
    }
    assert (found["SNF FC"]["here"], found["SNF FC"]["difference"]) == ("947.5", "+0.4")
    assert found["Relative gradient FC"]["here"] == "-"
    assert found["SNF conv"]["here"] == "failed"
    assert found["Glow 2L-16K"]["here"] == "not done"
    own = found["SNF FC, tracked inverse (ours)"]
    assert (own["paper"], own["here"], own["difference"]) == ("", "946.0", "")
    assert summary.AS_THE_PAPER in page
    assert "- fc-relative, seed 0: training diverged: lost" in page
    assert "- conv-snf, seed 0: RuntimeError: no" in page


@pytest.mark.parametrize("scale", ["cpu", "smoke"])
def test_a_reduced_page_says_that_the_difference_means_nothing(scale):
    reduced = record(scale)
    page = report.markdown(reduced)
    assert f"Scale **{scale}**" in page
    assert summary.WITHOUT_MEANING in page
    assert summary.AS_THE_PAPER not in page
    assert len(reduced["reductions"]) >= 5
    for text in reduced["reductions"]:
        assert f"- {text}" in page
    assert f"epochs: {10 if scale == 'cpu' else 2} in place of 6000" in page


def test_times_have_quartiles_and_left_out_rows_are_named():
    figure4 = EXPERIMENTS["figure4"]
    runs = {
        f"{kind}-{size}": [
            {"seed": 0, "batch_ms": t, "batch_q1": t - 1, "batch_q3": t + 1, "seconds": 1.0}
        ]
        for kind, power in (("snf", 2), ("exact", 3))
        for size in (32, 128, 224)
        for t in [1.5 + size**power]
    }
    found = record("smoke", figure4, runs, "figure4")
    page = report.markdown(found)
    assert cells(page)["snf, D = 32"]["here"] == "1025.500 [1024.500 1026.500]"
    assert "rows left out: snf-320, " in page
    assert f"exact: time ~ D^{found['fits']['exact']['exponent']:.2f} over D = 32 to 224" in page


def test_very_small_and_very_large_numbers_keep_digits():
    assert report._number(4.1e-8, 6) == "4.1e-08"
    assert report._number(1e8, 1) == "1e+08"
    assert report._number(0.0, 3) == "0.000"
    assert report._number(-0.25, 2, "+") == "-0.25"
    assert report._number(None, 2) == ""


def test_the_papers_numbers_are_drawn_only_where_they_compare(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(draw, "_points", lambda axes, found, mean, *rest: drawn.append(mean))
    monkeypatch.setattr(draw, "_save", lambda path, figure: None)
    bare = replace(TABLE1, rows=TABLE1.rows[:2])
    for scale in ("full", "smoke"):
        monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *args, **kwargs: None)
        draw.bars(record(scale, bare), tmp_path, tmp_path / "a.png")
    assert drawn == ["mean", "paper", "mean"]


def test_no_number_of_a_record_is_infinite():
    for row in record()["rows"]:
        for found in row["measures"].values():
            assert all(math.isfinite(v) for v in found.values() if isinstance(v, (int, float)))
