"""The figures of the documentation about speed are those of the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import performance

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
WHOLE = ("linear", "conv", "models", "sampling", "linear-avx512", "conv-avx512")

pytestmark = pytest.mark.skipif(
    not (RESULTS.is_dir() and DOCS.is_dir()), reason="no results or docs beside these tests"
)


def result(suite: str) -> dict:
    return json.loads((RESULTS / f"{suite}-cpu.json").read_text(encoding="utf-8"))


def page() -> str:
    return (DOCS / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("suite", WHOLE)
def test_tables_of_the_page(suite):
    assert performance.origin(result(suite)) in page()
    assert performance.table(result(suite)) in page()


def test_figure_4_of_the_page():
    figure4 = result("figure4")
    assert performance.origin(figure4) in page()
    assert performance.growth_table(figure4) in page()
    section = page().split("## Figure 4")[1].split("\n## ")[0]
    cases = re.findall(r"^\| (D=\d+(?: Adam)?) \|", section, re.MULTILINE)
    assert {"D=32", "D=32 Adam", "D=800", "D=1568", "D=3104", "D=4064 Adam"} <= set(cases)
    assert performance.table(figure4, cases) in section


def test_a_missed_target_is_in_its_cell():
    row = {"case": "a", "ratio_base": "native", "ratio_q1": 1.0, "ratio_q3": 2.0}
    native = {**row, "variant": "native", "median_s": 0.002, "fraction_of_floor": 0.5}
    other = {**row, "variant": "composed", "ratio": 1.5, "target": 5.0}
    rows = [{**native, "ratio": 1.0, "met": None}, {**other, "met": False}]
    assert performance.table({"rows": rows}).splitlines() == [
        "| case | native, ms | of the floor | composed |",
        "|---|---|---|---|",
        "| a | 2 | 0.50 | 1.50 [1.00 2.00] **wanted 5** |",
    ]


def medians(suite: str) -> dict:
    return {(r["case"], r["variant"]): r for r in result(suite)["rows"]}


def test_linear_figures_of_the_readme():
    rows = medians("linear")
    lines = re.findall(r"^\| (\d+) \| ([\d. |]+) \|$", README, re.MULTILINE)
    assert len(lines) == 4
    for features, cells in lines:
        for variant, cell in zip(
            ("native", "composed", "exact", "products (out=)"), cells.split(" | "), strict=True
        ):
            assert cell == performance.milliseconds(rows[f"D={features}", variant])


def test_convolution_figures_of_the_readme():
    rows = medians("conv")
    (images,) = re.findall(r"^\| image \| (.*) \|$", README, re.MULTILINE)
    (kernels,) = re.findall(r"^\| kernel \| (.*) \|$", README, re.MULTILINE)
    (ratios,) = re.findall(r"^\| composed / native \| (.*) \|$", README, re.MULTILINE)
    columns = list(zip(*(line.split(" | ") for line in (images, kernels, ratios)), strict=True))
    assert len(columns) == 9
    for image, kernel, ratio in columns:
        case = f"{image.replace('×', 'x')} k={kernel[0]}"
        assert ratio == f"{rows[case, 'composed']['ratio']:.1f}"


def test_model_figures_of_the_readme():
    rows = {**medians("models"), **medians("sampling")}
    lines = re.findall(r"^\| (\S+) layers?.*? \| ([\d. |×]+) \|$", README, re.MULTILINE)
    assert [line[0] for line in lines] == ["2", "9", "8"]
    names = ("fc 2 layers 1x28x28", "conv 9 layers 1x28x28", "glow 2L-4K-16W 1x28x28")
    for name, (_, cells) in zip(names, lines, strict=True):
        train = [rows[name, v] for v in ("native", "composed, DxD base", "compiled reference")]
        wanted = [performance.milliseconds(row) for row in train]
        if (f"100 samples, {name}", "native") in rows:
            sample = [rows[f"100 samples, {name}", v] for v in ("native", "composed")]
            wanted += [performance.milliseconds(row) for row in sample]
        assert [cell for cell in cells.split(" | ") if cell.strip()] == wanted
