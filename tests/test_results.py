"""The tables of docs/results.md are those of the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import study

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "cpu-study", ROOT / "docs" / "results.md"

pytestmark = pytest.mark.skipif(
    not (RESULTS.is_dir() and PAGE.is_file()), reason="no results or docs beside these tests"
)


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", study.TABLES)
def test_tables_of_the_page(name):
    page = PAGE.read_text(encoding="utf-8")
    assert study.origin(record(name)) in page
    for table in study.TABLES[name]:
        assert table(record(name)) in page
    assert all(row["runs"] for row in record(name)["rows"])


def test_what_the_page_says_of_the_study():
    """The orderings that its text claims."""
    rows = {row["name"]: row for row in record("table1")["rows"]}
    nll = {name: row["measures"]["nll"]["mean"] for name, row in rows.items()}
    seconds = {name: row["seconds"] for name, row in rows.items()}
    assert nll["conv-snf"] / nll["conv-exact"] < 1.01
    assert 1.03 < nll["fc-snf"] / nll["fc-exact"] < 1.05
    for model in ("fc", "conv"):
        assert abs(nll[f"{model}-tracked"] / nll[f"{model}-exact"] - 1) < 0.001
        assert seconds[f"{model}-exact"] > 2.5 * seconds[f"{model}-snf"]
        assert seconds[f"{model}-exact"] > 4 * seconds[f"{model}-tracked"]
    assert nll["fc-relative"] < nll["fc-exact"]


def test_a_row_without_a_mean_is_a_dash():
    row = {"measures": {"nll": {"mean": None, "std": None}}}
    assert study.value(row, "nll", 1) == "-"
    row = {"measures": {"nll": {"mean": 1.25, "std": 0.5}}}
    assert study.value(row, "nll", 1) == "1.2 ± 0.5"
