"""The training on MNIST beside the public code's curve: its start, its schedule, its names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(ROOT))

pytest.importorskip("numpy")

from bench import cases, mnist  # noqa: E402

SMALL = {
    "fc": cases.ModelCase("fc", (1, 4, 4), 2),
    "conv": cases.ModelCase("conv", (1, 8, 8), 6, model="conv", blocks=3),
}


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_all_variants_have_the_same_start(case):
    (ours, _), (theirs, _) = (mnist.build(case, v, seed=3) for v in ("native", "composed"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    other, _ = mnist.build(case, "native", seed=4)
    assert not torch.equal(next(m.bias for m in ours.modules() if hasattr(m, "bias")),
                           next(m.bias for m in other.modules() if hasattr(m, "bias")))  # fmt: skip


def test_start_of_the_public_code():
    flow, _ = mnist.build(cases.ModelCase("fc", (1, 16, 16), 2), "native", seed=0)
    for layer in flow.bijections[4::2]:
        assert torch.equal(layer.weight, torch.eye(256))
        assert torch.equal(layer.weight_inv, torch.eye(256))
        assert layer.bias.std().item() == pytest.approx(1 / 16, rel=0.2)
    case = cases.ModelCase("conv", (16, 4, 4), 2, model="conv", blocks=2)
    flow, _ = mnist.build(case, "native", seed=0)
    first, last = flow.bijections[3], flow.bijections[-1]
    for layer in (first, last):
        noise = layer.weight - torch.nn.init.dirac_(torch.empty_like(layer.weight))
        assert torch.equal(layer.weight_inv, layer.weight.flip(2, 3).transpose(0, 1))
        assert layer.bias.std().item() == pytest.approx(noise.std().item(), rel=0.5)


@pytest.mark.parametrize(("epoch", "shares"), [(1, [1, 2, 3]), (10, [28, 29, 30]), (11, [30] * 3)])
def test_rate_is_warmed_up_over_ten_epochs(epoch, shares, monkeypatch):
    monkeypatch.setattr(mnist, "product_step", lambda: lambda: None)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    rates = []

    def backward(batch):
        assert batch.dtype == torch.float32
        rates.append(optimizer.param_groups[0]["lr"])

    images = torch.zeros(3 * mnist.BATCH, 1, 1, 1, dtype=torch.uint8)
    steps, _ = mnist.train_epoch(model, backward, optimizer, images, epoch, rate=1e-3)
    assert len(steps) == 3
    assert rates == pytest.approx([1e-3 * share / 30 for share in shares])


def test_first_name_still_works():
    """Of the command in the recorded results."""
    command = [sys.executable, "-m", "bench.mnist_fc", "--epochs", "-1", "--data-dir", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "python -m bench.mnist: error: --epochs must not be negative; got -1",
    )
