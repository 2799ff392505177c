"""The benchmark of small tables, and the figures of docs/general.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import general_models, tabular, toy_densities

ROOT = Path(__file__).resolve().parents[1]


def test_splits_are_disjoint_standardised_and_repeat():
    parts = tabular.read("diabetes", 0)
    assert [len(part) for part in parts] == [265, 88, 89]
    train, val, test = parts
    torch.testing.assert_close(train.mean(0), torch.zeros(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.std(0), torch.ones(10), rtol=0, atol=1e-5)
    for other in (val, test):  # noise of a tenth in ten dimensions
        assert torch.cdist(other, train).min() > 0.1
        assert 0.8 < other.std() < 1.2
    for again, part in zip(tabular.read("diabetes", 0), parts, strict=True):
        assert torch.equal(again, part)
    assert not torch.equal(tabular.read("diabetes", 1)[0], train)


def nll_of_the_whole_map(flow, rows):
    """By the chain rule on the whole flow, which knows of no layers."""
    summed = torch.autograd.functional.jacobian(lambda x: flow(x).z.sum(0), rows)
    z = flow(rows).z
    log_density = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    return -(log_density + summed.transpose(0, 1).det().abs().log()).mean().item()


def test_a_short_run_reports_the_exact_likelihood_of_its_best_weights(
    tmp_path, capsys, monkeypatch
):
    flows = []
    spy = {
        name: (lambda size, args, make=make: flows.append(make(size, args)) or flows[-1], loss)
        for name, (make, loss) in general_models.MODELS.items()
    }
    monkeypatch.setattr(tabular, "MODELS", spy)
    out = tmp_path / "tabular.json"
    short = "--steps 6 --every 2 --batch 16 --width 4 --data diabetes --seeds 1"
    assert tabular.main([*short.split(), "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [run["model"] for run in result["runs"]] == list(general_models.MODELS)
    _, val, test = tabular.read("diabetes", 1)
    printed = capsys.readouterr().out
    for run, flow in zip(result["runs"], flows, strict=True):
        assert run["steps"] == 6
        for rows, key in ((test, "nll"), (val, "validation_nll")):
            assert run[key] == pytest.approx(nll_of_the_whole_map(flow, rows), rel=1e-5)
        assert f"diabetes, {run['model']}, seed 1: test NLL {run['nll']:.3f} nats" in printed
    assert tabular.table(result) in printed


def test_training_stops_where_validation_no_longer_improves():
    settings = tabular._parse(["--steps", "99", "--every", "1", "--patience", "3", "--lr", "30"])
    run = tabular.train("diabetes", "coupling", 0, settings)
    assert run["steps"] == run["best_step"] + 3


@pytest.mark.parametrize(
    ("suite", "file"),
    [(toy_densities, "toy-densities-cpu.json"), (tabular, "tabular-cpu.json")],
    ids=["toy", "tabular"],
)
def test_documented_figures_are_those_of_the_file(suite, file):
    page = ROOT / "docs" / "general.md"
    if not page.exists():
        pytest.skip("no docs beside these tests")
    result = json.loads((ROOT / "bench" / "results" / file).read_text(encoding="utf-8"))
    assert suite.table(result) in page.read_text(encoding="utf-8")
    assert result["environment"]["command"] in page.read_text(encoding="utf-8")
