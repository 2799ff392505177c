"""The study of controllers on a small model: its rows, its judgement, and a run cut off."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

pytest.importorskip("numpy")

import snf_ext
from bench import controllers as study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch):
    """Digits-sized images and a model for them in place of MNIST and its."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10_400, 1, 4, 4), generator=generator, dtype=torch.uint8)
    monkeypatch.setattr(study, "read_images", lambda folder: images)
    monkeypatch.setitem(study.MODELS, "fc", (lambda: snf_ext.models.fc((1, 4, 4)), 0.05))
    monkeypatch.setattr(study, "SETTLED", 50)


def test_rows_and_going_on_after_a_cut(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fc.json"
    command = ["--model", "fc", "--data-dir", ".", "--steps", "100", "--out", str(out), "--only"]
    assert study.main([*command, "relative", "fixed 1"]) == 0
    whole = json.loads(out.read_text())
    assert [row["run"] for row in whole["rows"]] == ["relative", "fixed 1"]
    for row in whole["rows"]:
        assert row["layers"] == ["bijections.4", "bijections.6"]
        trace = row["trace"]
        assert trace["step"] == [50, 100]
        assert row["largest_error"] == max(trace["error"][1])
        assert row["largest_error_in_kappa"] == row["largest_error"] / study.KAPPA
        assert (row["rises"] or row["falls"]) == (row["run"] == "relative")
        assert 0 < row["nll"] < 1e3
    assert {"commit", "torch"} <= set(whole["environment"])
    assert "of the best fixed lambda" in capsys.readouterr().out

    # Cut off after the first run, and gone on with: the second is done, the first is not.
    cut = {**whole, "rows": whole["rows"][:1]}
    cut["rows"][0]["nll"] = 1.25
    out.write_text(json.dumps(cut))
    assert study.main([*command, "relative", "fixed 1"]) == 0
    again = json.loads(out.read_text())["rows"]
    assert [row["nll"] for row in again] == [1.25, whole["rows"][1]["nll"]]
    with pytest.raises(SystemExit, match=r"--out must be new or of .*; .* is of "):
        study.main([*command[:5], "150", *command[6:], "fixed 1"])


def test_a_run_that_diverges_says_where(small):
    flow = snf_ext.constrain(snf_ext.models.fc((1, 4, 4)), snf_ext.Fixed(1.0))
    images = study.read_images(Path())
    row = study.train(flow, 1e12, images, images, 200)
    assert row["nll"] is None
    assert 0 < row["diverged_at"] < 200
    assert study.judged(row, 1e-2)["falls"] is False


def test_judgement():
    trace = {
        "step": [500, 550, 600],
        "error": [[9.0, 9.0], [0.02, 0.01], [0.01, 0.03]],
        "recon_weight": [[1.0, 1.0], [2.0, 1.0], [2.0, 0.5]],
    }
    found = study.judged({"trace": trace}, 0.01)
    assert found["largest_error"] == 0.03
    assert found["largest_error_in_kappa"] == pytest.approx(3)
    assert (found["rises"], found["falls"]) == (True, True)
    assert found["last_recon_weight"] == [2.0, 0.5]
