"""The benchmarks of exact values: what they compare is equal, and differences are seen."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import snf_ext
from bench import (
    cases,
    compare,
    exact,
    exact_cases,
    exact_dense,
    exact_memory,
)
from bench.timing import Noise, Timing, Variant

OPERATIONS = ("log-det", "log-det + gradient", "solve", "factorise + solve")
SMALL = {
    "blocks": exact_cases.ExactCase("", 2, 24, 4),
    "away": exact_cases.ExactCase("", 2, 24, 4, away=True),
    "groups": exact_cases.ExactCase("", 4, 24, 3, groups=2),
    "dilation": exact_cases.ExactCase("", 2, 24, 4, dilation=2),
    "circular": exact_cases.ExactCase("", 2, 6, 5, circular=True),
}


def of_a_millisecond(variants, rounds=2, **_):
    return {v.name: Timing(v.name, 1, [1e-3] * rounds) for v in variants}


# ---- The comparison ------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_all_ways_compute_the_same(name, operation):
    case = dataclasses.replace(SMALL[name], operation=operation)
    variants = exact.exact_variants(case)
    exact.check_values(variants)
    if name != "dilation":
        assert case.plan.method == ("fourier" if case.circular else "blocks")
    has_band = operation in ("log-det", "solve") and name not in ("dilation", "circular")
    expected = [f"package ({case.plan.method})", "dense"] + ["band"] * has_band
    assert [v.name for v in variants] == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_against_the_layer(operation):
    """What the steps return is what they claim to."""
    case = exact_cases.ExactCase(operation, 2, 3, 4)
    weight = exact.make_weight(case)
    matrix = snf_ext.exact.conv2d_matrix(weight, (3, 4))
    for v in exact.exact_variants(case):
        value = v.step()
        if operation.startswith("log-det"):
            torch.testing.assert_close(value, torch.linalg.slogdet(matrix).logabsdet)
        else:
            assert value.shape == (exact.RIGHT_SIDES, 24)
            torch.manual_seed(0)
            rhs = value @ matrix.T
            assert 0.9 < rhs.std() < 1.1  # of standard normal numbers
        for grad in v.gradients():
            places = 24 * torch.eye(2, dtype=grad.dtype)[:, :, None] / 2
            torch.testing.assert_close(grad[:, :, 1, 1:2], places, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_a_difference_is_seen(what):
    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def step(error):
        leaf.grad = torch.tensor([1.0, 5.0 + error * (what == "gradient")], dtype=torch.float64)
        return torch.tensor([1.0, 5.0 + error * (what == "value")], dtype=torch.float64)

    right, wrong = (Variant(str(e), lambda e=e: step(e), leaves=(leaf,)) for e in (0.0, 1e-8))
    exact.check_values([right, right])
    with pytest.raises(RuntimeError, match=f"1e-08 and 0.0 differ by 2.0e-09 in the {what}"):
        exact.check_values([right, wrong])


def test_weights_are_what_their_names_say():
    near, away = (
        exact.make_weight(exact_cases.ExactCase("", 8, 4, 4, away=away)) for away in (False, True)
    )
    dirac = torch.nn.init.dirac_(torch.empty(8, 8, 3, 3, dtype=torch.float64))
    assert 0 < (near - dirac).std() < 0.01 * 0.2
    assert (away - dirac).std().item() == pytest.approx(0.3 / (9 * 8) ** 0.5, rel=0.1)
    assert near.dtype == away.dtype == torch.float64


def test_table_has_the_targets_and_an_end_to_dense():
    table = cases.table("exact")
    assert len({case.name for case in table}) == len(table)
    targets = {c.name: c.targets["dense"] for c in table if getattr(c, "targets", None)}
    assert targets["log-det 1x28x28 k=3"] == targets["log-det + gradient 1x28x28 k=3"] == 10
    assert targets["log-det 16x7x7 k=3 away"] == 3
    assert targets["log-det + gradient 12x16x16 k=3"] == 15
    assert len(targets) == 10
    large = exact_cases.ExactCase("log-det", 3, 64, 64)
    assert large in table
    assert [v.name for v in exact.exact_variants(large)] == ["package (blocks)", "band"]
    assert cases.table("exact", "cuda") == ()


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (exact_cases.ExactCase("log-det", 2, 24, 4), 6),  # 1, 2, 4, 8, 16, 24 rows
        (exact_cases.ExactCase("log-det + gradient", 1, 6, 6, kernel=5), 3),  # 2, 4, 6 rows
    ],
    ids=lambda case: getattr(case, "name", None),
)
def test_every_size_of_block_is_timed_and_judged(case, count, monkeypatch, capsys):
    steps = {}

    def interleave(variants, **_):
        steps.update({v.name: v.step for v in variants})
        return {v.name: Timing(v.name, 1, [1e-3 * (i + 1)]) for i, v in enumerate(variants)}

    monkeypatch.setattr(exact, "interleave", interleave)
    rows = exact.layout_rows(case, rounds=1, min_sample=0.0)
    if case.height != case.width:
        columns = [row for row in rows if row["transposed"]]
        assert [row["rows"] for row in columns] == [1, 2, 4]
        rows = [row for row in rows if not row["transposed"]]
    assert len(rows) == count
    (chosen,) = [row for row in rows if row["chosen"]] or [r for r in columns if r["chosen"]]
    assert f"choice within {chosen['over_best']:.2f} x of the best" in capsys.readouterr().out
    first, *others = [step() for step in steps.values()]
    for other in others:  # a transposed image's kernel gradient is transposed
        other = other.mT if other.dim() > 1 and other.shape != first.shape else other
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


def test_no_blocks_no_sizes():
    for case in (SMALL["circular"], SMALL["dilation"]):
        case = dataclasses.replace(case, operation="log-det")
        assert exact.layout_rows(case, 1, 0.0) == []
    assert exact.layout_rows(dataclasses.replace(SMALL["blocks"], operation="solve"), 1, 0.0) == []


@pytest.mark.parametrize("variant", ["package", "dense"])
def test_memory_of_a_process_of_its_own(variant, monkeypatch):
    large = exact_cases.ExactCase("factorise + solve", 3, 32, 32, away=True)
    case = exact_cases.MemoryCase(large, variant, limit=10)
    assert dataclasses.replace(case, limit=None) in exact_cases.MEMORY
    row = exact_memory.measure(case)
    assert row["met"] is False
    dense = 8 * 3072**2
    if variant == "dense":  # the matrix and its LU
        assert 1.5 * dense < row["bytes"] < 4 * dense
    else:
        assert 1e6 < row["bytes"] < 0.5 * dense


def test_memory_of_a_process_that_fails(monkeypatch):
    monkeypatch.setattr(exact_memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the process ended with exit status 1"):
        exact_memory.measure(exact_cases.MEMORY[0])


def test_command_judges_and_records(monkeypatch, tmp_path, capsys):
    target = {"dense": 1.5}
    small = dataclasses.replace(SMALL["blocks"], operation="log-det", targets=target, quick=True)
    memory = exact_cases.MemoryCase(small, "package", limit=1)
    row = {"case": small.name, "variant": "package", "bytes": 2_000_000, "limit_bytes": 1_000_000}
    row |= {"dense_matrix_bytes": 3_000_000, "met": False}
    monkeypatch.setattr(cases, "table", lambda *_: (small, memory))
    monkeypatch.setattr(compare, "interleave", of_a_millisecond)
    monkeypatch.setattr(exact, "interleave", of_a_millisecond)
    monkeypatch.setattr(exact_memory, "measure", lambda case: row)
    monkeypatch.setattr(compare, "machine_noise", lambda device: Noise(1e-3, 1e-3, 1e-3))
    out, picture = tmp_path / "exact.json", tmp_path / "exact.png"
    pytest.importorskip("matplotlib")
    assert compare.main(["exact", "--out", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "targets met: 0 of 2" in printed
    assert "dense / package (blocks) 1.00, wanted 1.5" in printed
    assert "package: 2.0 MB (one dense matrix: 3.0 MB), wanted <= 1 MB" in printed
    result = json.loads(out.read_text())
    assert [r["variant"] for r in result["rows"]] == ["package (blocks)", "dense", "band"]
    assert result["memory"] == [row]
    assert len(result["layouts"]) == 9
    assert picture.read_bytes()[:4] == b"\x89PNG"


# ---- The dense ways ------------------------------------------------------------------------------


def test_swapped_and_put_back():
    layer = snf_ext.ExactConv2d(2, 3).double()
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    before = layer(x)
    z, inverse = before.z.detach(), layer.inverse(before.z.detach())
    originals = (
        snf_ext.exact.of_layer.factorize_conv2d,
        snf_ext.exact.conv2d_log_abs_det,
        snf_ext.exact.FactorizationCache.get,
    )
    seen = []

    def log_abs_det(weight, *geometry):
        seen.append(geometry)
        return exact_dense.dense_log_abs_det(weight, *geometry)

    def factorize(weight, *geometry):
        seen.append(geometry)
        return exact_dense.DenseInverse(weight, *geometry, dtype=torch.float64)

    with exact_dense.swapped(factorize, log_abs_det, cached=False):
        torch.testing.assert_close(layer(x).log_det, before.log_det)
        for _ in range(2):
            torch.testing.assert_close(layer.inverse(z), inverse)
    assert seen == [((4, 5), 1, 1, False)] * 3
    with pytest.raises(KeyError), exact_dense.swapped(exact_dense.Nothing, log_abs_det, False):
        raise KeyError
    assert originals == (
        snf_ext.exact.of_layer.factorize_conv2d,
        snf_ext.exact.conv2d_log_abs_det,
        snf_ext.exact.FactorizationCache.get,
    )
