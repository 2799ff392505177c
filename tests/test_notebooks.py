"""The notebooks run from the first cell to the last, and say what they are kept saying."""

from __future__ import annotations

import os
import re

import pytest
from cli_runs import environment
from doc_pages import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def said(notebook) -> list[str]:
    """The lines that its cells print."""
    return [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
        for line in output.text.splitlines()
    ]


def split(line: str) -> tuple[str, list[float]]:
    """The words of a line, and the numbers between them."""
    number = r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]\d+)?"
    return re.sub(number, "#", line), [float(found) for found in re.findall(number, line)]


def agree(words: str, before: float, now: float) -> bool:
    """Likelihoods to a fiftieth; angles and errors, which rounding moves more, in their size."""
    if any(unit in words for unit in ("nats", "bits/dim", "integral")):
        return abs(before - now) <= 0.02 * before
    return before == now or before / 3 <= now <= 3 * before


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    assert path.stat().st_size < 500_000
    for name, value in (environment() | {"MPLBACKEND": ""}).items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    kept = nbformat.read(path, as_version=4)
    before = said(kept)
    assert len(before) > 4
    new = nbclient.NotebookClient(
        kept,
        timeout=None,
        startup_timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    after = said(new)
    assert len(before) == len(after)
    for was, now in zip(before, after, strict=True):
        (words, old), (same, got) = split(was), split(now)
        assert words == same
        assert all(agree(words, a, b) for a, b in zip(old, got, strict=True)), (was, now)


def test_numbers_are_compared():
    words, (value,) = split("exact: 1.934 nats")
    assert words == "exact: # nats"
    assert agree(words, value, 1.95)
    assert not agree(words, value, 2.0)
    words, (value,) = split("learned: relative error 1.5e-03")
    assert agree(words, value, 3e-3)
    assert not agree(words, value, 1e-2)
