"""The benchmark of toy densities: its densities, objectives and integral."""

from __future__ import annotations

import json

import pytest
import torch

import snf_ext
from bench import general_models, toy_densities


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
    whole, near = toy_densities.integral(general_models.coupling(2, settings), 200)
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
        loss = general_models.MODELS[name][1]
        (got,) = torch.autograd.grad(loss(flow, x), f.weight)
        torch.testing.assert_close(got, factor * exact, rtol=1e-5, atol=1e-6)


def test_a_short_run_leaves_its_numbers(tmp_path, capsys):
    out = tmp_path / "toy.json"
    short = "--steps 3 --batch 16 --width 4 --blocks 1 --test 50 --grid 60 --densities rings"
    short += " --seeds 0 1"
    assert toy_densities.main([*short.split(), "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    wanted = [(model, seed) for seed in (0, 1) for model in general_models.MODELS]
    assert [(run["model"], run["seed"]) for run in result["runs"]] == wanted
    printed = capsys.readouterr().out
    for run in result["runs"]:
        mass = torch.tensor(run["integral"]).log().item()
        assert run["normalised_nll"] == pytest.approx(run["nll"] + mass, abs=1e-5)
        assert f"rings, {run['model']}, seed {run['seed']}: NLL {run['nll']:.3f}" in printed
    assert toy_densities.table(result) in printed
    both = [run["nll"] for run in result["runs"] if run["model"] == "coupling"]
    row = f"| rings | coupling | {sum(both) / 2:.3f} ± {abs(both[0] - both[1]) / 2**0.5:.3f} |"
    assert row in printed


@pytest.mark.parametrize("size", [2, 10, 30])
def test_couplings_have_as_many_parameters(size):
    settings = toy_densities._parse([])
    counts = [
        general_models.count(make(size, settings)) for make, _ in general_models.MODELS.values()
    ]
    assert max(counts) < 1.04 * min(counts)


def test_exact_objective_is_the_likelihood_and_the_penalty():
    settings = toy_densities._parse(["--width", "4", "--blocks", "2"])
    flow = general_models.self_norm(2, settings)
    x = torch.randn(50, 2)
    first, second = flow.bijections
    h = first.f(x)
    recon = sum((b.g(b.f(y)) - y).square().sum(1) for b, y in ((first, x), (second, h)))
    want = settings.recon_weight * recon.mean() - flow.log_prob(x).mean()
    torch.testing.assert_close(general_models.exact_loss(flow, x), want)
