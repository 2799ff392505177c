"""The Glow benchmarks on small models: what they record, and that divergence is seen."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import snf_ext
from bench import glow_mnist, report, sfm_stability

SMALL = sfm_stability.Run(
    experiment="actnorm",
    name="small",
    batch_size=2,
    lr=1e-4,
    penalty=1e-3,
    init_images=4,
    levels=2,
    steps=2,
    width=4,
)


def images(count=12, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, 8, 8), generator=generator, dtype=torch.uint8)


def test_stable_run():
    run = sfm_stability.train(SMALL, images(), updates=4, seed=0)
    assert run["diverged_at"] is None
    assert len(run["bits_per_dim"]) == 4
    assert all(0 < bits < 30 for bits in run["bits_per_dim"])
    # Two levels of two steps, and the split prior's coupling.
    assert len(run["largest_outputs_after_one_update"]) == 5
    assert all(value > 0 for value in run["largest_outputs_after_one_update"])


def test_diverged_run_ends_and_says_where(tmp_path):
    wild = dataclasses.replace(SMALL, lr=1e6, name="wild")
    run = sfm_stability.train(wild, images(), updates=20, seed=0)
    assert run["diverged_at"] == len(run["bits_per_dim"]) - 1 < 19
    last = run["bits_per_dim"][-1]
    assert last is None or abs(last) >= sfm_stability.DIVERGED
    other = sfm_stability.train(SMALL, images(), updates=3, seed=0)
    penalty = dataclasses.asdict(dataclasses.replace(SMALL, experiment="penalty"))
    result = {
        "environment": report.environment("a command"),
        "runs": [run, other, {**other, "settings": penalty}],
    }
    sfm_stability.draw(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_penalty_holds_determinants_near_one():
    """The same run with the penalty ends with smaller determinants than without."""
    ends = []
    for penalty in (0.0, 1e-2):
        settings = dataclasses.replace(SMALL, penalty=penalty, lr=1e-2)
        torch.manual_seed(0)
        flows = []
        make = snf_ext.models.glow

        def remember(*args, make=make, flows=flows, **kwargs):
            flows.append(make(*args, **kwargs))
            return flows[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snf_ext.models, "glow", remember)
            sfm_stability.train(settings, images(60), updates=25, seed=0)
        ends.append(flows[0].squared_log_dets().item())
    assert ends[1] < 0.1 * ends[0]


def test_glow_variants_differ_as_named_and_are_drawn(tmp_path, monkeypatch):
    assert {tuple(v.values()) for v in glow_mnist.VARIANTS.values()} >= {
        ("self_norm",), ("self_norm", 5), ("plain",), ("lu",), ("lu", "additive"),
    }  # fmt: skip
    monkeypatch.setattr(glow_mnist, "BATCH", 8)
    digits = torch.randint(256, (24, 1, 28, 28), dtype=torch.uint8)
    settings = glow_mnist.VARIANTS["LU 1x1, additive"]
    flow, row = glow_mnist.train(settings, digits, digits[:10], epochs=1, seed=0)
    assert len(row["nll"]) == 1
    assert math.isfinite(row["nll"][0])
    kinds = {type(m).__name__ for m in flow.modules()}
    assert {"LUConv1x1", "AdditiveCoupling"} <= kinds
    picture = glow_mnist.samples(flow, seed=0)
    assert picture.shape == (5 * 29 - 1, 5 * 29 - 1)
    assert 0 <= picture.min() <= picture.max() <= 1
    glow_mnist.draw([{"variant": "LU", **row}], [picture], "title", tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"
