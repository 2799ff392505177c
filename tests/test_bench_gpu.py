"""What the benchmarks add on a GPU, as far as it shows without one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import snf_ext

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, compare, floors, graphs, report, steps, summary
from bench.timing import Noise, Timing, Variant

ROOT = Path(__file__).resolve().parents[1]
RATES = floors.Rates(float32=50e12, tf32=400e12, copy=4e12)
LINEAR, CONV = cases.LinearCase(16, 4), cases.ConvCase(2, 4, 5, 3, 4)
MODEL = cases.ModelCase("fc", (1, 4, 4), 2, 4)
CONV_MODEL = cases.ModelCase("conv", (1, 8, 8), 6, 4, model="conv", blocks=3)
BUILDS = [(steps.linear_variants, LINEAR), (steps.conv_variants, CONV)]


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Builds the variants of a GPU, wherever they run."""
    monkeypatch.setattr(steps, "_is_cuda", lambda device: True)
    monkeypatch.setattr(steps, "native_is_built", lambda device: snf_ext.build_info()["cpp"])


def replayed(variants, graphed=graphs.graphed):
    """Stand-in for CUDA graphs: a replay computes anew, into the tensors of the captured call."""
    captured, reasons = [], {}
    for v in variants:

        def capture(step, v=v):
            step()
            static = v.gradients()

            def replay():
                step()
                for old, new in zip(static, v.gradients(), strict=True):
                    old.copy_(new)

            return replay

        more, why = graphed([v], capture)
        captured += more
        reasons |= why
    return captured, reasons


# ---- Cases and floors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "moved", "adam", "launches"),
    [
        # x, z | x, z, dz, dx; W, R | W, R, dW, dR; c | c, dc; log_det, recon and their gradients
        (cases.ConvCase(1, 28, 28, 3, 100), 4 * (6 * 78_400 + 6 * 9 + 3 + 400), None, 3),
        (cases.ConvCase(48, 4, 4, 3, 100), 4 * (6 * 76_800 + 6 * 20_736 + 144 + 400), None, 3),
        (cases.LinearCase(784), 17_171_648, 7 * 4 * 1_230_096, 8),
        (cases.ModelCase("fc", (1, 28, 28), 2), 33_288_704, 7 * 4 * 2_460_192, 16),
        # x, y | x, dy, dx; 3K - 1 a pixel: in, in, gradient; log_det and its gradient
        (cases.SplineCase(784, 5, 100), 4 * (5 * 78_400 + 3 * 10_976 + 200), None, 5),
        # 9 convolutions (kernels 6 * 9 * C^2, three each with C = 1, 4, 16) and 8 splines
        (
            cases.ModelCase("conv", (1, 28, 28), 9, model="conv", blocks=3),
            4 * (9 * (6 * 78_400 + 400) + 3 * 54 * 273 + 3 * 3 * 21)
            + 8 * 4 * (5 * 78_400 + 3 * 10_976 + 200),
            7 * 4 * 102_613,
            9 * 3 + 8 * 5,
        ),
    ],
    ids=["1x28x28", "48x4x4", "D=784", "fc", "spline", "conv"],
)
def test_bytes_and_launches(case, moved, adam, launches):
    assert case.bytes == moved
    assert getattr(case, "adam_bytes", None) == adam
    assert case.launches == launches


def test_operations_of_the_convolutional_model():
    """Six convolutions a layer; at every scale B D elements, each from 9 C products."""
    case = next(c for c in cases.table("models", "cuda") if c.model == "conv")
    assert case.flops == 6 * 2 * 100 * 784 * 9 * 3 * (1 + 4 + 16)
    assert case.parts[2].name == "1x28x28 k=3"
    assert case.parts[-1].name == "16x7x7 k=3"


def test_floor_is_the_largest_of_three():
    small, wide = cases.ConvCase(1, 28, 28, 3, 100), cases.LinearCase(3104)
    assert floors.floor(small, RATES).seconds == 3 * 2e-6  # launches
    operations = 12 * 128 * 3104**2
    assert floors.floor(wide, RATES).seconds == pytest.approx(operations / 50e12)
    # z and the residual stay float32, the other four products need not.
    tf32 = floors.floor(wide, RATES, tf32=True)
    assert tf32.operations == pytest.approx(operations * (2 / 6 / 50e12 + 4 / 6 / 400e12))
    adam = floors.floor(wide, RATES, adam=True, tf32=True)
    assert adam.seconds == adam.bytes == pytest.approx((wide.bytes + wide.adam_bytes) / 4e12)
    assert adam.launches == pytest.approx(10 * 2e-6)


def test_targets_of_a_gpu():
    table = {c.name: c for c in (*cases.table("conv", "cuda"), *cases.table("linear", "cuda"))}
    for name in ("1x28x28 k=3", "4x14x14 k=3", "16x7x7 k=3"):
        assert table[name].graph_us == {"native": 10.0}
    for name in ("12x16x16 k=3", "24x8x8 k=3", "48x4x4 k=3"):
        assert table[name].graph_us == {"native": 16.0}
        assert (table[name].batch, table[name].targets["composed"]) == (100, 10.0)
    assert table["D=784"].graph_us["native, fused Adam"] == 45.0
    assert table["D=784"].targets["composed"] == 5.0
    assert table["D=3104"].graph_us["native, fused Adam"] == 250.0
    assert all(c.targets["compiled reference, graph"] == 1.0 for c in table.values())


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setattr(floors, "sample", lambda step, device: [0.5, 0.25, 0.125])
    assert floors.copy_bandwidth("cpu", size=4096) == 2 * 4096 / 0.25


# ---- Judgement -----------------------------------------------------------------------------------


def judged(medians, case, with_floors=True):
    timings = {name: Timing(name, 1, [us * 1e-6] * 3) for name, us in medians.items()}
    bounds = {name: floors.floor(case, RATES) for name in medians} if with_floors else None
    found = report.rows(
        case.name,
        timings,
        flops=case.flops,
        targets=case.targets,
        rate=RATES.float32,
        graph_us=case.graph_us,
        floors=bounds,
        gpu=with_floors,
    )
    return {r["variant"]: r for r in found}


def test_targets_are_judged_under_graph_replay_alone():
    case = cases.table("conv", "cuda")[0]
    rows = judged({"native": 60, "native, graph": 8, "composed": 75}, case)
    assert (rows["native"]["limit_s"], rows["native"]["met"]) == (None, None)
    assert rows["native, graph"]["limit_s"] == pytest.approx(1e-5)
    assert rows["native, graph"]["met"] is True
    assert rows["native, graph"]["fraction_of_floor"] == pytest.approx(6 / 8)
    assert rows["composed"]["ratio"] == pytest.approx(75 / 8)
    assert rows["composed"]["met"] is False

    slow = judged({"native": 60, "native, graph": 11}, case)
    assert slow["native, graph"]["met"] is False
    eager = judged({"native": 60, "composed": 900}, case)
    assert [r["met"] for r in eager.values()] == [None, None]


def test_a_cpu_keeps_its_targets():
    case = cases.table("conv")[0]
    rows = judged({"native": 60, "composed": 900}, case, with_floors=False)
    assert (rows["composed"]["target"], rows["composed"]["met"]) == (15.0, True)


def test_summary_puts_each_native_step_on_a_line(tmp_path):
    case = cases.table("linear", "cuda")[0]
    case = dataclasses.replace(case, graph_us={**case.graph_us, "native": 15.0})
    medians = {"native": 80, "native, graph": 20, "native, fused Adam": 90}
    medians |= {"native, fused Adam, graph": 50, "composed": 240, "composed, graph": 60}
    medians |= {"compiled reference": 90, "compiled reference, graph": 19}
    rows = list(judged(medians, case).values())
    result = {"rows": rows, "noise_after": None, "problems": ["D=128: went wrong"]}
    report.write_json(tmp_path / "linear-cuda.json", result)

    problem, cut, _, plain, adam = summary.table(tmp_path).splitlines()
    assert problem == "linear-cuda.json: D=128: went wrong"
    assert cut == "linear-cuda.json: cut short, 8 rows"
    missed = "MISSED: over 15 us; compiled reference, graph 0.95 < 1"
    assert plain.split(maxsplit=7) == [
        "D=784",
        "80.0",
        "20.0",
        "18.9",
        "0.94",
        "12.00",
        "0.95",
        missed,
    ]
    name, rest = adam[:17], adam[17:].split(maxsplit=6)
    assert name == "D=784, fused Adam"
    assert rest == ["90.0", "50.0", "18.9", "0.38", "-", "-", "MISSED: over 45 us"]


# ---- Steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "case"), BUILDS, ids=["linear", "conv"])
def test_steps_from_given_gradients_agree(build, case, like_a_gpu):
    variants = build(case)
    captured, reasons = replayed(variants)
    on_host = {steps.ON_HOST} if case is CONV else set()
    assert set(reasons.values()) == {steps.FACTORISES} | on_host
    assert len({v.name for v in (*variants, *captured)}) == len(variants) + len(captured)
    compare.check_gradients([*variants, *captured])


def test_given_gradients_are_those_of_a_mean(like_a_gpu):
    x = torch.randn(5, 3, requires_grad=True)
    log_det, recon = x.sum(1), 2 * x.sum(1)
    steps._ending(x)(torch.zeros_like(x, requires_grad=True), log_det, recon)
    torch.testing.assert_close(x.grad, torch.full((5, 3), (2 - 1) / 5))


@pytest.mark.parametrize(
    ("build", "case"),
    [*BUILDS, (steps.model_variants, MODEL), (steps.model_variants, CONV_MODEL)],
    ids=["linear", "conv", "fc", "conv model"],
)
def test_no_step_leaves_the_device(build, case, like_a_gpu):
    """On the meta device, which mixes with the CPU as little as a GPU does."""
    for v in build(case, device="meta"):
        if "fused Adam" in v.name:  # not there for this device
            continue
        if case is CONV_MODEL and v.name.startswith("composed"):  # its masks need numbers
            continue
        with v.context():
            v.step()
        assert {g.device.type for g in v.gradients()} <= {"meta"}


def test_tf32_is_allowed_inside_the_context_only(like_a_gpu):
    variants = {v.name: v for v in steps.linear_variants(LINEAR)}
    if "native TF32" not in variants:
        pytest.skip("the compiled library is not built")
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32
    with variants["native TF32"].context():
        assert matmul.allow_tf32
        assert snf_ext.backend() == "native"
    assert not matmul.allow_tf32


# ---- Graphs --------------------------------------------------------------------------------------


def doubling():
    """A step that leaves the gradient 2 in its leaf."""
    leaf = torch.zeros(3, requires_grad=True)

    def step():
        leaf.grad = None
        (2 * leaf).sum().backward()

    return Variant("doubling", step, leaves=(leaf,))


def test_what_cannot_be_captured_keeps_its_reason():
    def fails(step):
        raise RuntimeError("CUDA error: operation not permitted\nand many more lines")

    tried = doubling()
    untried = dataclasses.replace(tried, name="untried", no_graph="no reason")
    captured, reasons = graphs.graphed([tried, untried], fails)
    assert captured == []
    assert reasons == {"doubling": "CUDA error: operation not permitted", "untried": "no reason"}


def test_a_replay_is_compared_by_what_it_writes():
    variant = doubling()
    captured, _ = replayed([variant])
    assert [v.name for v in captured] == ["doubling, graph"]
    compare.check_gradients([variant, *captured])

    def idle(step):
        step()
        return lambda: None

    captured, _ = graphs.graphed([variant], idle)
    with pytest.raises(RuntimeError, match="doubling, graph and doubling differ by nan"):
        compare.check_gradients([variant, *captured])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_capture_and_what_a_refused_one_leaves_intact():
    leaf = torch.ones(5, device="cuda", requires_grad=True)

    def step():
        leaf.grad = None
        (leaf * torch.rand_like(leaf)).sum().backward()

    replay = graphs.capture_graph(step)
    grad, seen = leaf.grad, []
    for _ in range(2):
        replay()
        seen.append(grad.clone())
    assert not torch.equal(*seen)  # a new draw each time

    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="synchroniz"):
        graphs.capture_graph(lambda: torch.rand(1, device="cuda").item())
    assert torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")
    replay()
    graphs.capture_graph(step)()


# ---- The comparison's command --------------------------------------------------------------------


def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        compare.main(["linear", "--graph"])
    assert "--graph needs --device cuda; got cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_has_to_be_there(capsys):
    with pytest.raises(SystemExit):
        compare.main(["linear", "--device", "cuda"])
    assert "finds no GPU" in capsys.readouterr().err


@pytest.fixture
def untimed(monkeypatch):
    """Steps and yardsticks take a millisecond each, by decree."""

    def interleave(variants, rounds, **_):
        return {v.name: Timing(v.name, 1, [1e-3] * rounds) for v in variants}

    monkeypatch.setattr(compare, "interleave", interleave)
    monkeypatch.setattr(compare, "machine_noise", lambda device: Noise(1e-3, 1e-3, 1e-3))
    rates = dataclasses.replace(RATES, copies=((2**30, RATES.copy),))
    monkeypatch.setattr(floors, "measure_cpu", lambda float32: rates)


def test_a_gpu_run_judges_graphs(like_a_gpu, untimed, monkeypatch):
    monkeypatch.setattr(graphs, "graphed", replayed)
    args = argparse.Namespace(suite="conv", device="cpu", compile=False, graph=True)
    args.rounds, args.min_sample, args.out = 2, 1e-4, None
    case = dataclasses.replace(CONV, targets={"composed": 1.5}, graph_us={"native": 1001.0})
    result = compare._Result(args, compare.machine_noise("cpu"), RATES)
    compare._measure(case, result)
    rows = {r["variant"]: r for r in result.rows}
    assert {"reference, graph", "composed, graph"} <= rows.keys()
    assert all(r["floor_s"] == 6e-6 for r in result.rows)
    assert result.notes == [
        f"{case.name}: exact is not timed as a CUDA graph: {steps.ON_HOST}",
        f"{case.name}: exact (dense) is not timed as a CUDA graph: {steps.FACTORISES}",
    ]
    if snf_ext.build_info()["cpp"]:
        assert {r["ratio_base"] for r in result.rows} == {"native, graph"}
        met = {name: r["met"] for name, r in rows.items() if r["met"] is not None}
        assert met == {"composed": False, "native, graph": True}


def test_native_that_cannot_be_captured_is_a_failure(like_a_gpu, untimed, monkeypatch):
    if not snf_ext.build_info()["cpp"]:
        pytest.skip("the compiled library is not built")
    monkeypatch.setattr(graphs, "graphed", lambda variants: ([], {"native": "it waits"}))
    args = argparse.Namespace(suite="conv", device="cpu", compile=False, graph=True)
    args.rounds, args.min_sample, args.out = 2, 1e-4, None
    result = compare._Result(args, compare.machine_noise("cpu"), RATES)
    compare._measure(CONV, result)
    assert result.problems == [f"{CONV.name}: native is not timed as a CUDA graph: it waits"]


def test_a_failed_case_stops_neither_the_next_nor_the_file(untimed, monkeypatch, tmp_path):
    seen = []

    def build(case, **_):
        if case.features == 32:
            raise RuntimeError("CUDA error: an illegal memory access")
        seen.append(json.loads(out.read_text())["problems"])
        return [Variant("reference", lambda: None)]

    out = tmp_path / "linear.json"
    monkeypatch.setitem(compare.SUITES, "linear", build)
    assert compare.main(["linear", "--quick", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert result["problems"] == ["D=32: CUDA error: an illegal memory access"] == seen[0]
    assert [r["case"] for r in result["rows"]] == ["D=128", "D=800"]
    assert result["noise_after"] is not None


def test_a_compiler_that_fails_leaves_the_rest():
    def broken():
        raise OSError("no C compiler found\nsearched in many places")

    notes, good = [], Variant("native", lambda: None)
    working = compare.without_broken_compiled([good, Variant("compiled", broken)], notes.append)
    assert working == [good]
    assert notes == ["compiled is left out: no C compiler found"]


def test_without_matplotlib_there_is_no_picture(untimed, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.plot", raising=False)
    monkeypatch.delattr("bench.plot", raising=False)  # where another test has imported it
    monkeypatch.setitem(
        compare.SUITES, "linear", lambda case, **_: [Variant("reference", lambda: None)]
    )
    picture = tmp_path / "a.png"
    assert compare.main(["linear", "--case", "D=32", "--plot", str(picture)]) == 0
    assert "no picture: " in capsys.readouterr().out
    assert not picture.exists()


def test_a_gpu_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    rows = judged({"native": 60, "native, graph": 8}, cases.table("conv", "cuda")[0])
    where = report.environment("test") | {"gpu": "A GPU", "driver": "1.2"}
    assert report.headline(where).startswith("A GPU, driver 1.2, torch ")
    path = tmp_path / "a.png"
    plot.draw({"suite": "conv", "environment": where, "rows": list(rows.values())}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_commit_may_be_named(monkeypatch):
    monkeypatch.setenv("SNF_COMMIT", "abc123")
    assert report.environment("test")["commit"] == "abc123"
