"""The memory benchmark: bytes counted right, and rows that hold what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import snf_ext

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import memory
from bench.live_bytes import watch
from bench.steps import native_is_built

ROOT = Path(__file__).resolve().parents[1]
FC, CONV = (next(c for c in memory.CASES if c.name.startswith(kind)) for kind in ("fc", "conv"))
SMALL = {
    "fc": replace(FC, event_shape=(1, 8, 8), batch=20),
    "conv": replace(CONV, event_shape=(1, 8, 8), batch=10),
}


def test_counts_what_autograd_is_known_to_keep():
    """``exp`` keeps its result; backward has one gradient more than results that are left."""
    x, layers = torch.randn(1000, requires_grad=True), 5
    with watch() as counted:
        y = x
        for _ in range(layers):
            y = y.exp()
        assert counted().now == layers * 4000
        loss = y.sum()
        del y
        assert counted().now == layers * 4000 + 4
        loss.backward()
        assert counted().peak == (layers + 1) * 4000 + 8  # the sum, and its gradient 1
        del loss
        assert counted().now == 4000  # x.grad


def test_what_was_there_and_views_are_not_counted():
    x, buffer = torch.ones(10, 10), torch.zeros(10)
    with watch() as counted:
        y = x.T[2:]
        buffer.add_(1)
        assert counted().now == 0
        z = y + 1
        assert (counted().now, counted().peak) == (z.nbytes, z.nbytes)
        del z
        assert (counted().now, counted().peak) == (0, y.nbytes)


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_what_autograd_says_it_saves(name):
    """But for what the operators' own small outputs and Python hold."""
    case = SMALL[name]
    step = memory.build(case, "reference")
    with step.context():
        x = memory.images(case, case.batch)
        step.run(x)
        known = {p.data_ptr() for p in step.model.parameters()} | {x.data_ptr()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        step.model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.forward(x).backward()
    counted = memory.count(case, "reference")["saved_bytes"]
    assert counted == pytest.approx(sum(saved.values()), rel=0.05)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_reversible_keeps_one_activation_whatever_the_depth(backend):
    if backend == "native" and not native_is_built():
        pytest.skip("the native backend is not built")
    found = {}
    for layers in (3, 9):
        case = memory.Case(
            "conv", lambda shape, n=layers: snf_ext.models.conv(shape, n), (1, 8, 8), 50
        )
        found[layers] = memory.count(case, f"{backend}, reversible")["saved_bytes"]
        ordinary = memory.count(case, backend)["saved_bytes"]
        assert found[layers] < ordinary / 4
    activation = 50 * 64 * 4
    # Besides it four random sums, log_det and recon of each sample and layer.
    assert activation < found[3] < 2 * activation
    assert found[9] - found[3] < activation


def test_rows_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "CASES", (replace(CONV, event_shape=(1, 8, 8), batch=10),))
    out = tmp_path / "memory.json"
    assert memory.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == memory.names(CONV)
    assert record["environment"]["command"].endswith(f"--quick --out {out}")
    for name, row in rows.items():
        assert 0 < row["saved_bytes"] < row["peak_bytes"]
        assert row["process_bytes"] is None or row["process_bytes"] >= 0
        assert row["met"] == (row["share_of_composed"] <= row["limit"] if row["limit"] else None)
        assert name in printed
    assert rows["composed"]["share_of_composed"] == 1
    with pytest.raises(SystemExit):
        memory.main(["--case", "no such case"])


def test_recorded_figures_are_of_these_cases_and_meet_the_limits():
    path = ROOT / "bench" / "results" / "memory-cpu.json"
    if not path.is_file():
        pytest.skip("no results beside these tests")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["case"] for row in rows} == {case.name for case in memory.CASES}
    limited = [row for row in rows if row["limit"] is not None]
    assert [row["variant"] for row in limited] == ["native", "native, reversible"]
    assert all(row["met"] for row in limited)


def test_the_page_has_the_recorded_figures():
    path, page = ROOT / "bench" / "results" / "memory-cpu.json", ROOT / "docs" / "choosing.md"
    if not (path.is_file() and page.is_file()):
        pytest.skip("no results and docs beside these tests")
    text = page.read_text(encoding="utf-8")
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        share = "" if row["share_of_composed"] is None else f"{row['share_of_composed']:.3f}"
        process = "" if row["process_bytes"] is None else f"{row['process_bytes'] / 1e6:.1f}"
        name = f"{row['case']} | {row['variant']}"
        numbers = f"{row['saved_bytes'] / 1e6:.2f} | {row['peak_bytes'] / 1e6:.2f}"
        assert f"| {name} | {numbers} | {share} | {process} |\n" in text
