"""The suite of Figure 4: its cases, its steps with Adam, and the floors of a CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import snf_ext

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, compare, dispatches, floors, growth, report, steps
from bench.figure4 import FIGURE4
from bench.timing import Noise, Timing

LINEAR = {(c.features, c.batch, c.adam): c for c in FIGURE4 if isinstance(c, cases.LinearCase)}
CPU = floors.Rates(2e11, 2e11, 1e10, launch=1e-6, copies=((10**6, 4e10), (10**7, 2e10)))
needs_native = pytest.mark.skipif(
    not snf_ext.build_info()["cpp"], reason="the compiled library is not built"
)


# ---- Cases ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_paper():
    sizes = [d for d, batch, adam in LINEAR if batch == 128 and adam]
    assert sizes == list(range(32, 4065, 96))
    assert sizes == [d for d, batch, adam in LINEAR if batch == 128 and not adam]
    names = [c.name for c in FIGURE4]
    assert len(set(names)) == len(names)
    assert {"D=800", "D=800 Adam", "D=800 batch=512", "1x64x64 k=3", "32x16x16 k=3"} <= set(names)
    assert cases.table("figure4") == FIGURE4
    assert [c.name for c in FIGURE4 if c.quick][:6] == [
        f"D={d}{adam}" for d in (32, 224, 800) for adam in ("", " Adam")
    ]


@pytest.mark.parametrize(
    ("features", "exact", "composed", "products"),
    [
        (32, 1.0, None, None),
        (704, 1.0, None, None),
        (800, 2.0, 5.0, None),
        (1568, 3.0, 5.0, 0.9),
        (3104, 5.5, 6.0, 0.9),
        (4064, 5.5, 6.0, 0.9),
    ],
)
@pytest.mark.parametrize("adam", [False, True])
def test_targets_hold_from_their_size_on(features, exact, composed, products, adam):
    targets = LINEAR[features, 128, adam].targets
    assert (targets["exact"], targets.get("composed")) == (exact, composed)
    assert targets["relative"] == pytest.approx(1 / 1.7)
    assert targets.get("products (out=)") == (None if adam else products)
    assert targets.get("compiled reference") == (None if adam else 1.0)


def test_long_steps_are_timed_less_often():
    rounds = [LINEAR[d, 128, True].rounds for d in (800, 1568, 4064)]
    assert rounds == [None, 11, 7]


# ---- Steps ---------------------------------------------------------------------------------------


def test_every_variant_ends_with_the_same_adam():
    variants = steps.linear_variants(cases.LinearCase(16, 4, adam=True))
    names = ["reference", "composed", "exact", "relative"]
    assert [v.name for v in variants] == steps.backends()[:-1] + names
    compare.check_gradients(variants)
    for v in variants:
        with v.context():
            counts = dispatches.count(v.step)
        assert v.adam
        assert counts["aten::_fused_adam_"] == 1, v.name
        if v.leaves:
            before = v.leaves[-1].clone()  # the bias, small enough to see the rate
            v.step()
            assert not torch.equal(before, v.leaves[-1])
    plain = steps.linear_variants(cases.LinearCase(16, 4))
    assert not any(v.adam for v in plain)
    assert len(plain) == len(variants) + 2  # the bare products


@needs_native
def test_limit_over_the_products_is_of_the_layer_alone():
    case = cases.LinearCase(16, 4, over_us={"native, given gradients": 60.0})
    variants = {v.name: v for v in steps.linear_variants(case)}
    counts = dispatches.count(variants["native, given gradients"].step)
    assert counts.total() < dispatches.count(variants["native"].step).total()
    assert "native, given gradients" not in {
        v.name for v in steps.linear_variants(dataclasses.replace(case, over_us={}))
    }

    medians = {"native": 150, "native, given gradients": 90, "products (out=)": 31}
    timings = {name: Timing(name, 1, [us * 1e-6] * 3) for name, us in medians.items()}

    def judged(limit):
        over = {"native, given gradients": limit}
        rows = report.rows("D", timings, flops=1, targets={}, rate=1, over_us=over)
        return {r["variant"]: r for r in rows}

    assert judged(60.0)["native, given gradients"]["met"] is True
    missed = judged(58.0)
    assert missed["native, given gradients"]["over_s"] == pytest.approx(59e-6)
    assert missed["native, given gradients"]["met"] is False
    assert missed["native"]["met"] is None
    words = compare._missed(missed["native, given gradients"])
    assert words == "native, given gradients 59.0 us over products (out=), wanted 58"


# ---- Floors --------------------------------------------------------------------------------------


def test_floor_of_a_cpu():
    wide, small = cases.LinearCase(3104), cases.LinearCase(32)
    assert floors.floor(wide, CPU).seconds == pytest.approx(12 * 128 * 3104**2 / 2e11)
    # Small enough for the fastest of the copies that are as large; two calls, one more for Adam.
    assert floors.floor(small, CPU).bytes == pytest.approx(small.bytes / 4e10)
    assert floors.floor(small, CPU).launches == pytest.approx(2e-6)
    assert floors.floor(small, CPU, adam=True).launches == pytest.approx(3e-6)
    adam = floors.floor(wide, CPU, adam=True)
    assert adam.bytes == pytest.approx((wide.bytes + wide.adam_bytes) / 1e10)
    model = cases.ModelCase("conv", (1, 28, 28), 9, model="conv", blocks=3)
    assert floors.floor(model, CPU, adam=True).launches == pytest.approx((2 * 17 + 1) * 1e-6)
    assert CPU.bandwidth(10**6) == 4e10
    assert CPU.bandwidth(10**6 + 1) == 2e10
    assert CPU.bandwidth(10**7 + 1) == 1e10
    assert not CPU.gpu


def test_rates_of_a_cpu_are_the_best_that_were_seen(monkeypatch):
    """Products take 1 ms each, copies too but for the smallest, ten times faster."""
    seen = []

    def sample(step, device="cpu", samples=30):
        step()
        seen.append(step)
        return [1e-4 if len(seen) == 4 else 1e-3] * 3

    monkeypatch.setattr(floors, "sample", sample)
    monkeypatch.setattr(floors, "PRODUCT_SIZES", (4, 16, 8))
    monkeypatch.setattr(floors, "COPY_SIZES", (1024, 4096))
    rates = floors.measure_cpu(1e3)
    assert rates.float32 == 2 * 16**3 / 1e-3
    assert rates.copies == ((2048, 2 * 1024 / 1e-4), (8192, 2 * 4096 / 1e-3))
    assert (rates.copy, rates.launch) == (rates.copies[-1][1], 1e-6)
    assert floors.measure_cpu(1e12).float32 == 1e12
    record = json.loads(json.dumps(rates.record()))
    assert record["dispatch_s"] == 1e-6
    assert "tf32_per_s" not in record
    assert "dispatch 1.00 us" in str(rates)


# ---- The command ---------------------------------------------------------------------------------


def test_run_ends_with_floors_and_growth(monkeypatch, tmp_path, capsys):
    """Steps take D^2 nanoseconds, by decree, and exact ones D^3."""
    table = [cases.LinearCase(d, 4, rounds=2) for d in (8, 16, 32)]
    power = {"exact": 3}
    size = iter(d.features for d in table)

    def interleave(variants, rounds, **_):
        assert rounds == 2
        d = next(size)
        return {
            v.name: Timing(v.name, 1, [1e-9 * d ** power.get(v.name, 2)] * rounds) for v in variants
        }

    monkeypatch.setattr(cases, "table", lambda *_: table)
    monkeypatch.setattr(compare, "interleave", interleave)
    monkeypatch.setattr(compare, "machine_noise", lambda device: Noise(1e-3, 1e-3, 1e-3))
    monkeypatch.setattr(floors, "measure_cpu", lambda float32: CPU)
    fixed = {"batch": 4, "adam": False}
    series = growth.Series("D", "features", fixed, 8, 32, {"native": 1.9}, {"exact": 2.6})
    monkeypatch.setattr(growth, "SERIES", (series,))
    out = tmp_path / "figure4.json"
    assert compare.main(["figure4", "--rounds", "5", "--out", str(out)]) == 0

    result = json.loads(out.read_text())
    assert result["floor"] == floors.CPU_FORMULA
    row = next(r for r in result["rows"] if r["case"] == "D=16 batch=4")
    assert (row["features"], row["batch"], row["adam"], row["rounds"]) == (16, 4, False, 2)
    assert row["floor_s"] == pytest.approx(2e-6)
    assert row["fraction_of_floor"] == pytest.approx(2e-6 / 256e-9)
    exponents = {r["variant"]: r["exponent"] for r in result["growth"]}
    assert exponents["exact"] == pytest.approx(3)
    assert exponents["reference"] == pytest.approx(2)
    printed = capsys.readouterr().out
    assert "reached" in printed
    if "native" in exponents:
        assert "  growth: native with D: 2.00, wanted <= 1.9" in printed


def test_picture_has_a_curve_for_each_column(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot, plot_figure4

    drawn = []

    def draw(figure, result):
        plot_figure4.draw_figure4(figure, result)
        drawn.append(figure.axes)

    names = ("native", "exact", "relative", "composed", "reference")
    rows = [
        {"variant": name, "features": d, "batch": 128, "adam": adam, "median_s": 1e-8 * d**2}
        for name in names
        for adam in (False, True)
        for d in (32, 800, 1568, 4064)
    ]
    layer = {"variant": "native", "channels": 1, "kernel": 3, "batch": 128, "median_s": 1e-3}
    rows += [{**layer, "height": size, "width": size} for size in (8, 16)]
    result = {"suite": "figure4", "environment": report.environment("test"), "rows": rows}
    result["growth"] = growth.growth(rows)
    path = tmp_path / "figure4.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw_figure4", draw)
        plot.draw(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    ((linear, convolution),) = drawn
    assert (linear.get_xscale(), linear.get_yscale()) == ("log", "log")
    assert len(linear.lines) == 4 * 2  # with Adam and without; the reference is in the table
    assert linear.lines[0].get_xydata().tolist() == [
        [d, pytest.approx(1e-5 * d**2)] for d in (32, 800, 1568, 4064)
    ]
    legend = linear.get_legend_handles_labels()[1]
    assert len(legend) == 4
    assert legend[0] == "self-normalizing (native), ~ D^2.00"
    assert convolution.lines[0].get_xdata().tolist() == [64, 256]
