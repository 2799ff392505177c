"""Each cell of docs/compatibility.md is backed by a test of its row, and the page is the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compatibility
import pytest
from cli_runs import environment
from compatibility import COLUMNS, KINDS, ROWS, Not

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def collected():
    """The names of all tests in the table's files, slow ones too."""
    there = [str(TESTS / name) for name in sorted(compatibility.files()) if (TESTS / name).exists()]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *there]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment(), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nodes: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        test, bracket, parameters = line.removeprefix("tests/").partition("[")
        nodes.setdefault(test, []).append(bracket + parameters)
    return nodes


@pytest.mark.parametrize("column", COLUMNS)
def test_every_cell_has_a_test(column, collected):
    unbacked = []
    for row in ROWS:
        cell = row.cell(column)
        if isinstance(cell, Not):
            assert cell.reason
            continue
        if not any(row.shown_by(node) for test in cell for node in collected.get(test, [])):
            unbacked.append((row.name, cell))
    assert not unbacked


def test_every_kind_has_every_column():
    assert all(tuple(columns) == COLUMNS for columns in KINDS.values())


def test_a_row_is_told_from_its_neighbours():
    rows = {row.name: row for row in ROWS}
    assert rows["ExactLinear"].shown_by("[training-ExactLinear-torch.float16]")
    assert not rows["ExactLinear"].shown_by("[training-SelfNormLinear]")
    assert not rows["snf_linear"].shown_by("")
    assert rows["RationalQuadraticSpline"].shown_by("[Spline]")


def test_the_page_is_the_table():
    """``python tests/compatibility.py`` writes it."""
    assert compatibility.page() == compatibility.PAGE.read_text()
