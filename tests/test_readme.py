"""The README is true: its code runs, its commands are those of CI, its links lead somewhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from doc_pages import README, ROOT, blocks, links, run_python, text_of

import snf_ext


@pytest.fixture(scope="module")
def namespace():
    """What the README's Python blocks define, run one after the other."""
    torch.manual_seed(0)
    return run_python(README)


def test_python_blocks_run(namespace):
    assert namespace["log_det"].shape == namespace["recon"].shape == (32,)
    assert namespace["layer"].weight_inv.grad.abs().max() > 0
    assert not namespace["tracked"].weight_inv.requires_grad
    assert all(
        c.recon_weight > 0 for c in snf_ext.constraint.controllers(namespace["held"]).values()
    )
    torch.testing.assert_close(namespace["true"], namespace["x"], rtol=0, atol=1e-4)
    torch.testing.assert_close(namespace["near"], namespace["x"], rtol=0, atol=1e-5)
    assert namespace["residual"].max() < 1e-6
    assert namespace["exact_log_det"].shape == ()
    assert namespace["nats"].shape == (100,)
    assert namespace["samples"].shape == (16, 64)
    assert sum(p.numel() for p in namespace["conv"].parameters()) > 102_613  # 5x5 inverses
    assert namespace["loss"].isfinite()
    assert namespace["drawn"].shape == (4, 1, 8, 8)


def test_equivalent_code_gives_the_layers_gradients(namespace):
    torch.manual_seed(1)
    layer = snf_ext.SelfNormLinear(5, bias=False).double()
    with torch.no_grad():
        layer.weight.add_(torch.randn(5, 5))
        layer.weight_inv.add_(torch.randn(5, 5))
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.weight_inv)
    upstream = (torch.randn(7, 5).double(), torch.randn(7).double(), torch.randn(7).double())

    ours = layer(x)
    theirs = namespace["SelfNormLinearFunction"].apply(*inputs)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(outputs, inputs, upstream) for outputs in (ours, theirs)]
    for got, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_ci_runs_the_two_commands():
    ci = ROOT / ".ci" / "run"
    if not ci.exists():
        pytest.skip("no .ci/run beside these tests")
    commands = [block.strip() for block in blocks(README, "sh")]
    assert len(commands) == 2, "the README starts with two commands"
    assert commands[0].endswith(".venv/bin/snf-ext train --model fc")
    assert commands[1].endswith(".venv/bin/pytest")
    lines = [line.strip() for line in ci.read_text(encoding="utf-8").splitlines()]
    for command in commands:
        assert "\n" not in command, "one line, to be copied whole"
        assert lines.count(command) == 1, f"not run by .ci/run: {command}"


def test_links_lead_to_files():
    if not (ROOT / "docs").exists():
        pytest.skip("no docs beside these tests")
    targets = links(README)
    assert "docs/images/digits-samples.png" in targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_gpu_figures_are_those_of_the_result_files():
    results = ROOT / "bench" / "results"
    if not results.is_dir():
        pytest.skip("no results beside these tests")
    medians = {}
    for suite in ("conv", "linear"):
        for row in json.loads((results / f"{suite}-cuda.json").read_text(encoding="utf-8"))["rows"]:
            medians[row["case"], row["variant"]] = row["median_s"] * 1e6
    lines = re.findall(
        r"^\| (3×3 at|fully connected, D =) (\S+) \| (.*) \|$", text_of(README), re.MULTILINE
    )
    assert len(lines) == 9
    for kind, size, cells in lines:
        case = f"{size.replace('×', 'x')} k=3" if kind == "3×3 at" else f"D={size}"
        products = "stock products" if kind == "3×3 at" else "products (fresh)"
        for variant, cell in zip(("native", "composed", products), cells.split("|"), strict=True):
            assert float(cell) == float(
                f"{medians[case, f'{variant}, graph']:.{3 if float(cell) < 1000 else 4}g}"
            )
