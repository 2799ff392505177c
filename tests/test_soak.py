"""Long runs: memory stays flat, cached log-determinants stay true. See bench/soak.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import soak

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not soak.STATM.exists(), reason="reads /proc"),
]


@pytest.mark.parametrize("name", soak.FLOWS)
def test_a_short_run(name):
    """Too short to tell of memory: of log-determinants and weights."""
    looks = list(soak.soak(name, 60, 20))
    assert [look.step for look in looks] == [20, 40, 60]
    found = soak.judged(looks)
    assert found["finite"]
    assert found["drift_nats"] == 0
    assert found["dense_drift_nats"] < soak.DRIFT
    assert looks[-1].nll < looks[0].nll


@pytest.mark.slow
@pytest.mark.parametrize("name", soak.FLOWS)
def test_two_thousand_steps(name):
    assert soak.measure(name, 2_000, 100)["met"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", soak.FLOWS)
def test_fifty_thousand_steps(name):
    assert soak.measure(name, soak.STEPS, soak.EVERY)["met"]


LOOKS = [soak.Look(step, 1000, 1.0, 1.0, 0.0, 0.0, True) for step in range(5, 101, 5)]


@pytest.mark.parametrize(
    ("what", "met"),
    [
        ({}, True),
        ({"resident_bytes": 1009}, True),
        ({"resident_bytes": 1010}, False),
        ({"drift": 0.01}, False),
        ({"dense_drift": 0.01}, False),
        ({"finite": False}, False),
    ],
)
def test_what_is_judged(what, met):
    assert soak.judged([*LOOKS[:-1], replace(LOOKS[-1], **what)])["met"] is met


def test_growth_in_the_warm_up_does_not_count():
    cold = [replace(look, resident_bytes=10) for look in LOOKS if look.step <= 10]
    assert soak.judged([*cold, *LOOKS[2:]])["met"]


def test_the_committed_result():
    path = ROOT / "bench" / "results" / "soak-cpu.json"
    if not path.is_file():
        pytest.skip("no results beside these tests")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [row["flow"] for row in record["rows"]] == list(soak.FLOWS)
    assert all(row["met"] and row["steps"] == soak.STEPS for row in record["rows"])
