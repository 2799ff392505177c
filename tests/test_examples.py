"""The scripts of docs/examples, run small: what they print is near the truth."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run(name, *arguments):
    path = EXAMPLES / f"{name}.py"
    if not path.exists():
        pytest.skip("no docs beside these tests")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments])


@pytest.mark.parametrize("posterior", ["regression", "banana"])
def test_variational_inference(posterior, capsys):
    found = run(
        "variational_inference", "--posterior", posterior, "--steps", "200", "--batch", "128"
    )
    truth = found["log evidence"]
    # A lower bound, and close to it
    assert truth - 0.15 < found["ELBO"] < truth + 4 * found["standard error"]
    assert found["importance sampling"] == pytest.approx(truth, abs=0.03)
    assert found["mean error"] < 0.25
    assert found["covariance error"] < 0.25
    printed = capsys.readouterr().out
    assert f"log evidence         {truth:9.4f} nats, exact" in printed
    assert printed.count("ELBO ") == 11


@pytest.mark.parametrize(
    ("simulator", "steps", "lr", "limit"),
    [("linear", "400", "0.02", 0.03), ("moons", "200", "0.01", 0.6)],
)
def test_posterior_estimation(simulator, steps, lr, limit, capsys):
    settings = ["--simulator", simulator, "--steps", steps, "--lr", lr, "--observations", "300"]
    found = run("posterior_estimation", *settings)
    assert -3 * found["standard error"] < found["KL"] < limit  # a divergence is not negative
    printed = capsys.readouterr().out
    assert printed.count("step ") == 10
    assert "regions hold" in printed
    if simulator == "linear":
        assert found["rank deviation"] < found["limit"]
        for level in (0.5, 0.8, 0.95):
            assert found[f"coverage {level}"] == pytest.approx(level, abs=0.08)
