"""The benchmark of toy densities: its densities, objectives and integral."""

from __future__ import annotations

import json

import pytest
import torch

import snf_ext
from bench import toy_densities


@pytest.mark.parametrize("name", toy_densities.DENSITIES)
def test_densities_are_finite_and_centred(name):
    points = toy_densities.DENSITIES[name](20000)
    assert points.shape == (20000, 2)
    assert points.abs().max() < 4
    assert points.mean(0).abs().max() < 0.05
    assert points.std(0).min() > 0.7
    assert points.std(0).max() < 1.3


def test_integral_is_one_of_a_density_and_more_where_f_folds():
    settings = toy_densities._parse(["--width", "4", "--blocks", "1"])
    whole, near = toy_densities.integral(toy_densities.coupling(settings), 200)
    assert near == pytest.approx(whole, rel=1e-12)
    assert abs(whole - 1) < 1e-4

    class Fold(torch.nn.Module):
        def forward(self, x):
            return x.abs() - 1

    class Quadrant(torch.nn.Module):
        def forward(self, z):
            return z + 1

    fold = snf_ext.Flow([snf_ext.SelfNormBijection(Fold(), Quadrant(), (2,))], (2,))
    # The mass above -1 of a normal, from both sides, on both axes.
    above = torch.special.ndtr(torch.tensor(1.0)).item()
    whole, near = toy_densities.integral(fold, 800)
    assert abs(whole - (2 * above) ** 2) < 1e-2
    # Of the four sheets one is brought back, and a margin of 0.15 beside it.
    assert above**2 < near < above**2 + 0.15


def test_all_objectives_agree_where_g_is_the_inverse():
    """At linear maps: the exact gradient of f, and half of it from the self-normalizing one."""
    settings = toy_densities._parse(["--width", "4", "--blocks", "1", "--probes", "2"])
    f, g = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    g.weight.data.copy_(f.weight.data.inverse())
    flow = snf_ext.Flow([snf_ext.SelfNormBijection(f, g, (2,), settings.probes)], (2,)).double()
    x = torch.randn(50, 2).double()
    (exact,) = torch.autograd.grad(-flow.log_prob(x).mean(), f.weight)
    for name, factor in (("self_norm", 0.5), ("exact", 1.0), ("free_form", 1.0)):
        loss = toy_densities.MODELS[name][1]
        (got,) = torch.autograd.grad(loss(flow, x), f.weight)
        torch.testing.assert_close(got, factor * exact, rtol=1e-5, atol=1e-6)


def test_a_short_run_leaves_its_numbers(tmp_path, capsys):
    out = tmp_path / "toy.json"
    short = "--steps 3 --batch 16 --width 4 --blocks 1 --test 50 --grid 60 --densities rings"
    assert toy_densities.main([*short.split(), "--out", str(out)]) == 0
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [run["model"] for run in runs] == list(toy_densities.MODELS)
    printed = capsys.readouterr().out
    for run in runs:
        assert run["normalised_nll"] == pytest.approx(
            run["nll"] + torch.tensor(run["integral_brought_back"]).log().item(), abs=1e-5
        )
        assert f"rings, {run['model']}: NLL {run['nll']:.3f}" in printed
