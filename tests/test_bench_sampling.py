"""Samples by the composition: its inverses undo its layers, and are those of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, compare, floors, models, sampling, steps
from bench.composed_conv import ComposedSpline, ComposedSqueeze
from bench.composition import ComposedConv2d, ComposedLinear, SmoothLeakyReLU
from bench.timing import Noise, Timing

FC = sampling.SampleCase(cases.ModelCase("fc", (1, 4, 4), 2), samples=6)
CONV = sampling.SampleCase(cases.ModelCase("conv", (1, 8, 8), 6, model="conv", blocks=3), 6)


def _randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


# ---- Layers --------------------------------------------------------------------------------------


def test_activation_and_spline_are_undone():
    x = torch.linspace(-12, 12, 50).double().view(10, 5)
    activation, spline = SmoothLeakyReLU(0.3), _randomised(ComposedSpline((5,)))
    torch.testing.assert_close(activation.inverse(activation(x)[0]), x)
    y = spline(x)[0].detach()
    torch.testing.assert_close(spline.inverse(y).detach(), x)
    assert not torch.allclose(x, y, atol=0.1)


def test_squeeze_is_undone():
    x = torch.randn(2, 3, 4, 6)
    squeeze = ComposedSqueeze()
    assert torch.equal(squeeze.inverse(squeeze(x)), x)


def test_learned_inverse_is_an_affine_map_of_r():
    linear = _randomised(ComposedLinear(4))
    z = torch.randn(3, 4).double()
    r = linear.weight_inv[:, :, 0, 0]
    torch.testing.assert_close(linear.inverse(z), (z - linear.bias) @ r.T)

    convolution = _randomised(ComposedConv2d(2, 3))
    eye = torch.eye(2 * 3 * 4).double().view(-1, 2, 3, 4)
    matrix = torch.nn.functional.conv2d(eye, convolution.weight_inv, padding=1).flatten(1).T
    z = torch.randn(5, 2, 3, 4).double()
    y = (z - convolution.bias.view(-1, 1, 1)).flatten(1)
    torch.testing.assert_close(convolution.inverse(z).flatten(1), y @ matrix.T)


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FC, CONV], ids=lambda case: case.model.model)
@pytest.mark.parametrize("backend", steps.backends())
def test_package_and_composition_draw_the_same(case, backend):
    sampling.check_samples(case, backend)


@pytest.mark.parametrize("part", ["weight_inv", "bias", "widths"])
def test_other_samples_are_seen(part, monkeypatch):
    original = sampling.composed_like

    def composed_like(*args):
        composed = original(*args)
        layer = composed.layers[1 if part == "widths" else 0]
        with torch.no_grad():
            getattr(layer, part).view(-1)[0].add_(0.1)
        return composed

    monkeypatch.setattr(sampling, "composed_like", composed_like)
    with pytest.raises(RuntimeError, match=r"reference and composed differ in \d+ of 256 pixels"):
        sampling.check_samples(CONV, "reference")


def test_samples_are_images():
    for v in sampling.sample_variants(CONV):
        with v.context():
            images = v.step()
        assert images.shape == (6, 1, 8, 8), v.name
        assert images.min() >= 0
        assert images.max() <= 255
        assert torch.equal(images, images.round())
        assert images.unique().numel() > 10


def test_composition_samples_under_its_own_noise():
    composed = models.composed_like(models.make_flow(FC.model), FC.model, base="normal")
    torch.manual_seed(3)
    drawn = composed.sample(6)
    torch.manual_seed(3)
    assert torch.equal(drawn, composed.pull(torch.randn(6, 16)))


# ---- The suite -----------------------------------------------------------------------------------


def test_what_samples_cannot_do_without():
    table = {c.model.model: c for c in sampling.SAMPLING}
    assert [c.samples for c in table.values()] == [100, 100]
    assert table["fc"].targets == {"composed": 5.0}
    assert table["conv"].targets == {"composed": 8.0}
    assert FC.flops == 2 * 2 * 6 * 16**2
    assert FC.bytes == 4 * 2 * (2 * 6 * 16 + (2 * 16**2 + 16) // 2)
    assert FC.calls == 2
    assert table["conv"].calls == 9 + 8


def test_run_of_the_suite(monkeypatch, tmp_path):
    def interleave(variants, rounds, **_):
        return {v.name: Timing(v.name, 1, [1e-3] * rounds) for v in variants}

    rates = floors.Rates(1e12, 1e12, 1e10, copies=((10**9, 1e10),))
    monkeypatch.setattr(compare, "interleave", interleave)
    monkeypatch.setattr(compare, "machine_noise", lambda device: Noise(1e-3, 1e-3, 1e-3))
    monkeypatch.setattr(floors, "measure_cpu", lambda float32: rates)
    monkeypatch.setattr(cases, "table", lambda *_: (FC,))
    out = tmp_path / "sampling.json"
    assert compare.main(["sampling", "--rounds", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["variant"] for r in rows] == [*steps.backends(), "composed", "exact inverse"]
    assert all(r["samples"] == 6 and r["floor_s"] > 0 for r in rows)
