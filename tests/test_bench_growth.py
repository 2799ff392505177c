"""Exponents of growth: against scipy's regression, and on power laws whose exponent is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import growth

SIZES = range(800, 4065, 96)


def noisy(exponent, sizes, rng, noise=0.1):
    """Seconds that grow as a power of the sizes, each off by a log-normal factor."""
    return [1e-7 * x**exponent * np.exp(noise * rng.standard_normal()) for x in sizes]


def test_fit_is_that_of_scipy():
    x = [3, 5, 8, 13, 40, 41]
    seconds = noisy(1.7, x, np.random.default_rng(0), noise=0.3)
    line = stats.linregress(np.log(x), np.log(seconds))
    reach = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    found = growth.fit(x, seconds)
    assert found.exponent == pytest.approx(line.slope, rel=1e-10)
    assert found.high - found.exponent == pytest.approx(reach, rel=1e-10)
    assert found.exponent - found.low == pytest.approx(reach, rel=1e-10)
    assert found.points == 6


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("points", [3, 35])
def test_interval_holds_the_exponent_in_95_of_100_fits(exponent, points):
    """Of 1000 fits 950 are expected, with a standard deviation of 7."""
    rng = np.random.default_rng(1)
    sizes = SIZES[:points]
    fits = [growth.fit(sizes, noisy(exponent, sizes, rng)) for _ in range(1000)]
    assert 922 <= sum(f.low <= exponent <= f.high for f in fits) <= 978
    assert np.median([f.exponent for f in fits]) == pytest.approx(exponent, abs=0.15)


def test_exact_power_law():
    found = growth.fit([1, 2, 4, 8], [5, 5 * 2**2.5, 5 * 4**2.5, 5 * 8**2.5])
    assert (found.low, found.exponent, found.high) == pytest.approx((2.5, 2.5, 2.5))


@pytest.mark.parametrize(
    ("x", "seconds", "message"),
    [
        ([1, 2], [1, 2], r"x must be at least 3 sizes, not all alike; got \[1, 2\]"),
        ([4, 4, 4], [1, 2, 3], r"x must be at least 3 sizes, not all alike; got \[4, 4, 4\]"),
        ([1, 2, 3], [1, 2], "x and seconds must be as many; got 3 and 2"),
        ([1, 2, 3], [1, 0, 2], "x and seconds must be positive"),
    ],
)
def test_what_cannot_be_fitted(x, seconds, message):
    with pytest.raises(ValueError, match=message):
        growth.fit(x, seconds)


def linear_rows(exponents, adam=False):
    """Rows of every D from 32 on; below 800 all take equally long."""
    rng = np.random.default_rng(2)
    return [
        {"variant": name, "features": d, "batch": 128, "adam": adam, "median_s": seconds}
        for name, exponent in exponents.items()
        for d, seconds in zip(
            range(32, 4065, 96),
            noisy(exponent, [max(d, 800) for d in range(32, 4065, 96)], rng, 0.01),
            strict=True,
        )
    ]


def test_series_are_fitted_in_their_range_and_judged():
    rows = linear_rows({"native": 2.05, "exact": 2.9, "composed": 2.4})
    rows += linear_rows({"native": 2.3, "exact": 2.5}, adam=True)
    # Other series: another batch and a convolution, too few to be fitted.
    rows += [{"variant": "native", "features": 800, "batch": 64, "adam": False, "median_s": 1.0}]
    layer = {"variant": "native", "channels": 1, "kernel": 3, "batch": 128, "median_s": 1.0}
    rows += [{**layer, "height": size, "width": size} for size in (8, 16, 24)]
    found = {(r["series"], r["variant"]): r for r in growth.growth(rows)}
    plain = found["D", "native"]
    assert (plain["first"], plain["last"], plain["points"]) == (800, 4064, 35)
    assert plain["exponent"] == pytest.approx(2.05, abs=0.02)
    met = {key: r["met"] for key, r in found.items()}
    assert met == {
        ("D", "native"): True,
        ("D", "exact"): True,
        ("D", "composed"): None,
        ("D, with Adam", "native"): False,
        ("D, with Adam", "exact"): False,
    }
    table = growth.lines(list(found.values()))
    assert len(table) == 6
    assert table[1].endswith("800..4064, 35 points  <= 2.15 met")
    assert table[5].endswith(">= 2.6 NOT MET")


def test_convolution_grows_with_its_pixels():
    layer = {"variant": "native", "channels": 1, "kernel": 3, "batch": 128}
    rows = [
        {**layer, "height": size, "width": size, "median_s": 1e-9 * size**2.0}
        for size in (8, 16, 32, 64)
    ]
    (found,) = growth.growth(rows)
    assert (found["series"], found["first"], found["last"]) == ("pixels, 1 channel", 256, 4096)
    assert found["exponent"] == pytest.approx(1.0)


def test_command_prints_the_table_of_a_file(tmp_path, capsys):
    path = tmp_path / "figure4.json"
    path.write_text(json.dumps({"rows": linear_rows({"native": 2.0})}))
    assert growth.main([str(path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("growth of the time with")
    assert row.split()[:2] == ["D", "native"]
    assert growth.main([]) == 2
    assert growth.lines([]) == ["growth: no series has three points"]
