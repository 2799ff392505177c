"""The model of the scaling: its formulas by hand, what it counts against the models, its page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import snf_ext
from bench import scaling, scaling_model
from bench.cases import ModelCase
from bench.scaling import CASES, LINKS, Facts
from bench.scaling_model import all_reduce_seconds

ROOT = Path(__file__).resolve().parents[1]
NVLINK, PCIE, NET400, NET100 = LINKS
SMALL_GLOW = ModelCase("", (1, 8, 8), 6, batch=2, model="glow", blocks=2, hidden=8)

# A step of 2 ms and 0.1 ms an image: 12 ms for its batch. 1,000 numbers are in the first bucket.
TOY = Facts("toy", 100, 1000, 2000, 3, 1e9, 50, 2e-3, 1e-4, 15e-3, [400, 400], measured=False)


@pytest.mark.parametrize(
    ("size", "ranks", "link", "seconds"),
    [
        # 8.4 us, 14 hops of 3.4 us, 7/4 of 1 GB at 360 GB/s
        (1e9, 8, NVLINK, 8.4e-6 + 47.6e-6 + 1.75 / 360),
        # 3.6 us, 2 hops of 2.7 us, 8 bytes at a quarter of 40 GB/s
        (8, 2, NET400, 3.6e-6 + 5.4e-6 + 8 / 10e9),
        # a tree: 4.4 us, 12 hops of 5 us, 16 bytes at 0.9 / 3.8 of 40 GB/s
        (8, 64, NET400, 4.4e-6 + 60e-6 + 16 / (0.9 * 40e9 / 3.8)),
        # no tree within a node: 3.6 us, 14 hops of 1 us, 14 bytes at a quarter of 51.2 GB/s
        (8, 8, PCIE, 3.6e-6 + 14e-6 + 14 / 12.8e9),
        # 8.4 us, 126 hops of 9.6 us, 63/32 of 100 MB at 10 GB/s
        (1e8, 64, NET100, 8.4e-6 + 1209.6e-6 + 0.0196875),
    ],
)
def test_seconds_of_an_all_reduce(size, ranks, link, seconds):
    assert all_reduce_seconds(size, ranks, link) == pytest.approx(seconds, rel=1e-9)


def test_buckets_hold_all_bytes():
    mib = 2**20
    assert scaling_model.buckets(mib // 2) == [mib // 2]
    assert scaling_model.buckets(51 * mib) == [mib, 25 * mib, 25 * mib]
    assert sum(scaling_model.buckets(4 * 66_705_928)) == 4 * 66_705_928


def test_overlap_hides_all_but_the_last_bucket():
    size, one_ms = 51 * 2**20, 1e-3
    parts = [all_reduce_seconds(part, 8, NET100) for part in (2**20, 25 * 2**20, 25 * 2**20)]
    seconds = scaling_model.gradient_seconds(size, 8, NET100, one_ms, overlap=False)
    assert seconds == pytest.approx(sum(parts))
    assert seconds > 5 * one_ms
    some = scaling_model.gradient_seconds(size, 8, NET100, one_ms, overlap=True)
    assert some == pytest.approx(sum(parts) - 2 / 3 * one_ms)
    most = scaling_model.gradient_seconds(size, 8, NET100, 1.0, overlap=True)
    assert most == pytest.approx(parts[-1])


@pytest.mark.parametrize(("weak", "images"), [(True, 100), (False, 13)])
def test_a_step_of_eight_ranks(weak, images):
    """Of 100 images the fullest of 8 ranks has 13."""
    seconds = scaling.step_seconds(TOY, 8, NVLINK, weak=weak, overlap=False)
    waits = [all_reduce_seconds(size, 8, NVLINK) for size in (4000, 400, 400, 16)]
    assert seconds == pytest.approx(2e-3 + images * 1e-4 + sum(waits))


def test_controllers_wait_once_a_layer():
    def seconds(inverse):
        how = {"weak": True, "overlap": False, "inverse": inverse}
        return scaling.step_seconds(TOY, 8, NVLINK, **how)

    more = all_reduce_seconds(8000, 8, NVLINK) - all_reduce_seconds(4000, 8, NVLINK)
    waits = 3 * all_reduce_seconds(8, 8, NVLINK) - 2 * all_reduce_seconds(400, 8, NVLINK)
    assert seconds("penalty") - seconds("tracked") == pytest.approx(more + waits)


def test_the_host_bounds_a_step_that_is_not_replayed():
    def seconds(ranks, replayed):
        how = {"weak": True, "overlap": False, "replayed": replayed}
        return scaling.step_seconds(TOY, ranks, NVLINK, **how)

    assert seconds(8, replayed=False) - seconds(8, replayed=True) == pytest.approx(3e-3)
    assert seconds(1, replayed=False) == pytest.approx(12e-3)  # one alone replays
    assert TOY.compute_s(200, replayed=False) == pytest.approx(22e-3)


def test_efficiency_of_rows():
    rows = list(scaling.rows([TOY]))
    assert len(rows) == 2 * 2 * (4 + 4 + 6 + 6)
    for row in rows:
        ideal = 12e-3 if row["weak"] else 12e-3 / row["ranks"]
        found = row["in_turn_efficiency"]
        assert found == pytest.approx(ideal / row["in_turn_s"])
        assert (found == 1) == (row["ranks"] == 1)
        assert found <= row["overlapped_efficiency"] <= 1


@pytest.mark.parametrize("name", ["FC 2L", "conv 9L", "Glow 2L-16K, MNIST"])
def test_facts_are_the_models(name):
    (facts,) = [f for f in scaling.facts_of(committed()) if f.model == name]
    for inverse, count in (("tracked", facts.tracked), ("penalty", facts.penalty)):
        flow = scaling.build(CASES[name], inverse)
        assert scaling.trained_parameters(flow) == count
        assert scaling.learned_layers(flow) == facts.learned


def by_hand(case):
    """Parameters with the penalty: those of the cases' parts, and actnorm's two a channel."""
    total, channels = sum(part.parameters for part in case.parts), case.event_shape[0]
    for _ in range(case.blocks if case.model == "glow" else 0):
        channels *= 4
        total += 2 * channels * case.steps
        channels //= 2
    return total


def test_parameters_and_operations_by_hand():
    facts = {f.model: f for f in scaling.facts_of(committed())}
    assert list(facts) == list(CASES)
    for name, case in CASES.items():
        assert facts[name].penalty == by_hand(case)
        assert facts[name].operations == case.flops / 100
    assert facts["FC 2L"].shown == [4 * 32 * 784] * 2  # 32 samples of each layer, in float32
    assert all(f.shown == [] for name, f in facts.items() if name != "FC 2L")


def test_tracked_inverses_are_no_parameters():
    facts = {f.model: f for f in scaling.facts_of(committed())}
    assert facts["FC 2L"].tracked == 2 * (784**2 + 784)
    assert facts["FC 2L"].penalty - facts["FC 2L"].tracked == 2 * 784**2
    kernels = 3 * 9 * (1 + 4**2 + 16**2)
    assert facts["conv 9L"].penalty - facts["conv 9L"].tracked == kernels
    mixing = 32 * (12**2 + 24**2 + 48**2)
    glow = facts["Glow 3L-32K, CIFAR-10"]
    assert glow.penalty - glow.tracked == mixing


@pytest.mark.parametrize(
    ("case", "close"),
    [
        (ModelCase("", (1, 6, 6), 2, batch=3), 0),
        (SMALL_GLOW, 0),
        # beside its convolutions the inverse's term, of the size of the kernel
        (ModelCase("", (1, 8, 8), 3, batch=100, model="conv", blocks=3), 0.01),
    ],
)
def test_operations_are_what_torch_counts(case, close):
    torch.manual_seed(0)
    flow = scaling.build(case, "penalty").train()
    x = torch.randint(256, (case.batch, *case.event_shape)).float()
    snf_ext.layers.initialize(flow, [x])
    with snf_ext.use_backend("reference"), FlopCounterMode(display=False) as counter:
        flow.loss(x).backward()
    assert case.flops == pytest.approx(counter.get_total_flops(), rel=close)


def test_dispatches_of_glow_grow_by_its_steps():
    assert scaling.count_dispatches(SMALL_GLOW) == scaling.count_step(
        scaling.build(SMALL_GLOW, "penalty")
    )


def committed():
    path = ROOT / "bench" / "results" / "scaling-model.json"
    if not path.exists():
        pytest.skip("no results beside these tests")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_is_what_the_model_says():
    result = committed()
    facts = scaling.facts_of(result)
    for row, again in zip(result["rows"], scaling.rows(facts), strict=True):
        for key, value in again.items():
            same = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert row[key] == same
    assert result["assumed"]["links"] == [asdict(link) for link in LINKS]
    assert result["assumed"]["reached"] == scaling.REACHED
    assert result["assumed"]["glow_share"] == scaling.GLOW_SHARE


def test_measured_steps_are_those_of_the_gpu():
    """Both parts of a measured step add up to it; an operator's share is the others' overhead."""
    result = committed()
    source = json.loads(scaling.MEASURED.read_text(encoding="utf-8"))
    steps, rate = scaling.measured_steps(source), source["rates"]["float32_per_s"]
    eager_steps = scaling.measured_steps(source, graph=False)
    facts = scaling.facts_of(result)
    measured = {f.model: f for f in facts if f.measured}
    assert set(measured) == {"FC 2L", "conv 9L"}
    for name, f in measured.items():
        assert f.compute_s(100) == pytest.approx(steps[CASES[name].name], rel=1e-9)
        assert f.image_s == pytest.approx(f.operations / rate, rel=1e-9)
        assert f.eager_s == eager_steps[CASES[name].name]
    eager = sum(f.eager_s / f.dispatches for f in measured.values()) / 2
    overhead = sum(f.fixed_s / f.dispatches for f in measured.values()) / 2
    for f in facts:
        if not f.measured:
            assert f.fixed_s == pytest.approx(overhead * f.dispatches, rel=1e-9)
            assert f.eager_s == pytest.approx(eager * f.dispatches, rel=1e-9)
            assert f.image_s == pytest.approx(f.operations / (0.5 * rate), rel=1e-9)


def test_tables_of_the_page():
    page = ROOT / "docs" / "scaling.md"
    if not page.exists():
        pytest.skip("no docs beside these tests")
    text = page.read_text(encoding="utf-8")
    for table in scaling.tables(committed()):
        assert table in text


def test_what_the_page_concludes():
    result = committed()
    facts = {f.model: f for f in scaling.facts_of(result)}
    glows = [name for name in facts if name.startswith("Glow")]
    at = {
        (r["model"], r["link"], r["ranks"], r["weak"]): r
        for r in result["rows"]
        if r["inverse"] == "tracked"
    }
    gains = [
        8 * at[name, link.name, 8, False]["overlapped_efficiency"]
        for name in glows
        for link in LINKS
    ]
    assert (round(min(gains), 1), round(max(gains), 1)) == (2.7, 3.7)
    for name in glows:
        for link in (NET400, NET100):
            assert round(at[name, link.name, 64, True]["overlapped_efficiency"], 2) >= 0.9
    cifar = at["Glow 3L-32K, CIFAR-10", "100 Gb/s", 64, True]
    assert round(cifar["in_turn_efficiency"], 2) == 0.72
    assert round(cifar["overlapped_efficiency"], 2) == 0.96
    gains = [
        r["ranks"] * r["overlapped_efficiency"]
        for r in result["rows"]
        if r["model"] in ("FC 2L", "conv 9L") and not r["weak"]
    ]
    assert max(gains) == pytest.approx(1.0)  # one GPU
    conv = facts["conv 9L"]
    assert scaling.controller_seconds(conv, 8, NET100) / conv.compute_s(100) == pytest.approx(
        0.5, abs=0.05
    )
    for name, f in facts.items():  # as it is: eight GPUs, none of which replays
        same, split = (
            f.compute_s(100)
            / scaling.step_seconds(f, 8, NVLINK, weak=weak, overlap=True, replayed=False)
            for weak in (True, False)
        )
        assert split < 1
        assert (4.5 < 8 * same < 5.5) if name in glows else (0.8 < 8 * same < 1)
        if name in glows:
            assert round(f.eager_s / f.dispatches * 1e6, 1) == 26.6
    overhead = facts[glows[0]].fixed_s / facts[glows[0]].dispatches
    assert round(overhead * 1e6, 1) == 3.0
    assert round(result["measured"]["float32_per_s"] / 1e12, 1) == 50.9


def test_cells_of_a_table():
    result = {"models": [asdict(TOY)], "rows": list(scaling.rows([TOY]))}
    lines = scaling.facts_table(result).splitlines()
    assert lines[2] == "| toy | 1,000 | 2,000 | 0.004 | 0.008 | 1 | 12 | 2 | modelled |"
    weak = scaling.efficiency_table(result, weak=True).splitlines()
    assert weak[0] == "| model | link | N = 2 | N = 4 | N = 8 | N = 16 | N = 64 |"
    assert weak[2] == "| toy | NVLink | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 / 1.00 |  |  |"
    # 16 ranks of 7 images, 64 of 2, and five trees of 44.4 and 64.4 us:
    # 12 / (16 * (2.7 + 0.223)), 12 / (64 * (2.2 + 0.323))
    split = scaling.efficiency_table(result, weak=False).splitlines()[4]
    assert split.endswith("| 0.26 / 0.26 | 0.08 / 0.08 |")
