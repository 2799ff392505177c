"""The benchmarks of the 9-layer model's exact values: equal to dense, and differences are seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import snf_ext
from bench import cases, exact_dense, exact_flow, exact_training, report
from bench.timing import Timing

MODEL = cases.ModelCase("conv", (1, 8, 8), 3, model="conv", blocks=3)


def images(count=150):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def of_a_millisecond(variants, rounds=2, **_):
    return {v.name: Timing(v.name, 1, [1e-3] * rounds) for v in variants}


# ---- The flow ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow():
    return exact_flow.trained(MODEL, images(), steps=3)


def test_flow_against_dense(flow):
    errors = exact_flow.check(flow, images(20))
    assert len(errors) == 2 * (2 + 3)
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("what", ["NLL, dense, once a weight", "samples, dense LU"])
def test_a_wrong_flow_is_seen(flow, what, monkeypatch):
    class Wrong(exact_dense.DenseLU):
        def solve(self, rhs):
            return 1.001 * super().solve(rhs)

    def wrong(weight, *geometry):
        lu = Wrong(snf_ext.exact.conv2d_matrix(weight.detach().double(), *geometry))
        if what.startswith("NLL"):
            lu.log_abs_det += 0.1  # of hundreds
        return lu

    table = exact_flow.NLL if what.startswith("NLL") else exact_flow.SAMPLE
    name = what.split(", ", 1)[1]
    monkeypatch.setitem(table, name, lambda: exact_dense.swapped(wrong))
    with pytest.raises(RuntimeError, match=f"{what} differs from the package by"):
        exact_flow.check(flow, images(5))


def test_flow_tables(flow, monkeypatch, capsys):
    factorised = []
    original = snf_ext.exact.of_layer.factorize_conv2d

    def counted(*args):
        factorised.append(args)
        return original(*args)

    def interleave(variants, rounds, **_):
        for v in (*variants, *variants[::-1]):
            with v.context():
                factorised.clear()
                v.step()
                counts.setdefault(v.name, []).append(len(factorised))
        return of_a_millisecond(variants)

    counts = {}
    monkeypatch.setattr(snf_ext.exact.of_layer, "factorize_conv2d", counted)
    monkeypatch.setattr(exact_flow, "interleave", interleave)
    rows = exact_flow.tables(flow, images(10), rounds=2, min_sample=0.0, rate=1e9)
    assert len(rows) == 4 + 3 + 6
    assert counts["package"] == [3] * 6  # every time anew, in all three tables
    assert counts["package, kept"] == [3, 0]
    assert {r["target"] for r in rows} == {None, 5.0, 10.0}
    layers = exact_flow.layer_seconds(flow, images(10))
    assert {"SelfNormConv2d", "RationalQuadraticSpline", "Squeeze"} <= layers.keys()
    text = exact_flow.profile(rows, layers)
    assert "of the NLL's 1 ms, determinants are 1.0 ms (100 %) with package" in text
    assert "free determinants would make it 2.00 times faster than dense" in text
    assert torch.equal(exact_flow.determinants(flow), exact_flow.determinants(flow))


# ---- Training ------------------------------------------------------------------------------------


def test_both_trainings_have_the_same_start_and_noise(monkeypatch):
    learned, exactly = exact_training.start(MODEL, seed=1)
    names = {name for name, _ in learned.named_parameters() if not name.endswith("weight_inv")}
    assert names == {name for name, _ in exactly.named_parameters()}
    for name in names:
        assert torch.equal(learned.get_parameter(name), exactly.get_parameter(name))
    seen = []
    for flow in (learned, exactly):
        trainee = exact_training.Trainee(flow, seed=0)
        monkeypatch.setattr(flow, "loss", lambda x: seen.append(torch.rand(3)) or torch.ones(
            (), requires_grad=True))  # fmt: skip
        for number in (1, 2):
            trainee.step(images(3), number)
        assert trainee.optimizer.param_groups[0]["lr"] == pytest.approx(2e-5)
        assert len(trainee.seconds) == 2
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_batches_go_round():
    data = torch.arange(250)
    starts = [exact_training.batch(data, n)[0].item() for n in (1, 2, 3)]
    assert starts == [0, 100, 49]
    assert all(len(exact_training.batch(data, n)) == 100 for n in range(1, 9))


def test_wrong_gradient_is_seen(monkeypatch):
    _, flow = exact_training.start(MODEL, seed=0)
    assert exact_training.check_gradients(flow) < 1e-12
    right = snf_ext.exact.conv2d_log_abs_det
    monkeypatch.setattr(
        snf_ext.exact, "conv2d_log_abs_det", lambda *args: (1 + 1e-8) * right(*args)
    )
    with pytest.raises(RuntimeError, match=r"differs from the dense one by 1\.0e-08"):
        exact_training.check_gradients(flow)


def test_training_side_by_side(tmp_path, capsys):
    result = exact_training.run(MODEL, images(), images(40), steps=4, every=3, seed=0)
    learned, exactly = (
        [row for row in result["rows"] if row["variant"] == name]
        for name in (exact_training.SELF_NORM, exact_training.EXACT)
    )
    assert [row["step"] for row in learned] == [0, 3, 4] == [row["step"] for row in exactly]
    assert learned[0]["nll"] == pytest.approx(exactly[0]["nll"], rel=1e-6)
    assert learned[-1]["nll"] == pytest.approx(exactly[-1]["nll"], rel=0.01)
    assert learned[-1]["nll"] < learned[0]["nll"]
    assert all(0 < row["angle_deg"] < 5 for row in learned)
    assert all(row["angle_deg"] == 0 for row in exactly)
    assert [t["steps"] for t in result["times"]] == [4, 4, 6, 6]
    assert result["times"][0]["over_self_normalizing"] == 1
    assert "times self-normalizing, 4 steps" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    exact_training.draw(result["rows"], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    report.write_json(tmp_path / "a.json", result)


@pytest.mark.parametrize("module", [exact_flow, exact_training], ids=["flow", "training"])
def test_too_few_images(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "read_images", lambda folder: images())
    assert module.main(["--data-dir", "."]) == 2
    assert "MNIST's 60,000 training images are needed; got 150" in capsys.readouterr().err
