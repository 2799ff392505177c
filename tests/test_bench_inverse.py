"""The scripts on ways to keep a learned inverse: small runs, and what their files hold."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import controllers, inverse_shapes, inverse_study, inverse_time

SMALL = {
    "fc": inverse_study.Model(
        lambda **how: inverse_study.snf_ext.models.fc((1, 28, 28), layers=1, **how),
        "linear",
        1e-3,
        1.0,
    ),
    "conv": inverse_study.Model(
        lambda **how: inverse_study.snf_ext.models.conv((1, 28, 28), 1, 1, **how), "conv", 1e-3, 1.0
    ),
}


@pytest.fixture
def mnist(tmp_path):
    """A folder like MNIST's with 60,000 images of noise."""
    images = np.random.default_rng(0).integers(0, 256, (60_000, 28, 28), dtype=np.uint8)
    header = struct.pack(">4i", 2051, len(images), 28, 28)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=0) as file:
        file.write(header + images.tobytes())
    return tmp_path


def test_a_study_goes_on_where_it_was_cut_off(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inverse_study, "MODELS", SMALL)
    out = tmp_path / "study.json"
    command = ["kept", "conv", "--data-dir", str(mnist), "--out", str(out), "--steps", "4"]
    command += ["--every", "2", "--validation", "200"]
    assert inverse_study.main([*command, "--seeds", "1", "--only", "exact", "tracked"]) == 0
    first = json.loads(out.read_text())
    assert [(row["method"], row["seed"]) for row in first["rows"]] == [("exact", 0), ("tracked", 0)]
    assert inverse_study.main([*command, "--seeds", "2", "--only", "tracked"]) == 0
    second = json.loads(out.read_text())
    assert second["rows"][:2] == first["rows"]
    assert [(row["method"], row["seed"]) for row in second["rows"][2:]] == [("tracked", 1)]
    exact, tracked = first["rows"]
    assert [point["step"] for point in tracked["points"]] == [2, 4]
    # Another gradient by a hair: the least-squares kernel is close to the inverse.
    for a, b in zip(exact["points"], tracked["points"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)
    assert exact["samples"]["exact"] < 1e-4
    assert tracked["samples"]["refined"] < 1e-6 < tracked["samples"]["learned"] < 1e-3
    assert max(tracked["points"][-1]["relative_error"].values()) < 0.1
    assert inverse_study.main([*command[:-6], "--steps", "5", "--only", "exact"]) == 2
    assert "must be of 5 steps; got 4" in capsys.readouterr().err


def test_norm_and_radius():
    torch.manual_seed(0)
    layer = inverse_study.snf_ext.SelfNormLinear(6).double()
    with torch.no_grad():
        layer.weight += 0.3 * torch.randn(6, 6)
        x = torch.randn(50, 6, dtype=torch.float64)
        relative, norm, radius = inverse_study.seen(layer, x, layer(x))
        error = torch.eye(6) - layer.weight @ layer.weight_inv
        assert norm == pytest.approx(torch.linalg.matrix_norm(error, 2).item(), rel=0.05)
        assert radius == pytest.approx(torch.linalg.eigvals(error).abs().max().item(), rel=0.3)
        back = x @ layer.weight.T @ layer.weight_inv.T
        assert relative == pytest.approx(((back - x).norm() / x.norm()).item() ** 2)


def test_bad_requests(mnist, tmp_path, capsys):
    common = ["--data-dir", str(mnist), "--out", str(tmp_path / "f.json")]
    for arguments, text in (
        (["asymmetric", "fc", *common], "asymmetric is for conv; got fc"),
        (["kept", "fc", *common, "--only", "best"], "--only takes exact, .*; got best"),
        (["kept", "fc", *common, "--seeds", "0"], "--seeds must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit):
            inverse_study.main(arguments)
        assert re.search(text, capsys.readouterr().err)


def test_times(tmp_path, monkeypatch):
    monkeypatch.setattr(inverse_time, "MODELS", SMALL)
    out = tmp_path / "time.json"
    assert inverse_time.main(["conv", "--rounds", "2", "--steps", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {"exact", "penalty", "tracked", "tracked 7x7"} <= {row["variant"] for row in rows}
    assert all(row["step_s"] > 0 for row in rows)


def test_shapes(monkeypatch):
    monkeypatch.setattr(inverse_shapes, "WEIGHTS", 1)
    rows = {row["inverse"]: row for row in inverse_shapes.measure((1, 6, 5), 0.1)}
    order = ["flip(w)", "3x3", "3x3 after 3x3", "5x5", "7x7"]
    residuals = [rows[name]["residual"] for name in order]
    assert residuals == sorted(residuals, reverse=True)
    assert rows["7x7"]["angle_deg"] < rows["3x3"]["angle_deg"] / 2


ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "inverse-kept-fc-cpu.json": inverse_study,
    "inverse-kept-conv-cpu.json": inverse_study,
    "inverse-debias-fc-cpu.json": inverse_study,
    "inverse-debias-conv-cpu.json": inverse_study,
    "inverse-asymmetric-conv-cpu.json": inverse_study,
    "controllers-fc-cpu.json": controllers,
    "controllers-conv-cpu.json": controllers,
    "controllers-glow-cpu.json": controllers,
    "inverse-time-fc-cpu.json": inverse_time,
    "inverse-time-conv-cpu.json": inverse_time,
    "inverse-shapes-cpu.json": inverse_shapes,
}


@pytest.mark.parametrize("file", FILES)
def test_documented_figures_are_those_of_the_file(file):
    page = ROOT / "docs" / "choosing.md"
    if not page.exists():
        pytest.skip("no docs beside these tests")
    record = json.loads((ROOT / "bench" / "results" / file).read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert file in text
    assert FILES[file].table(record) in text
