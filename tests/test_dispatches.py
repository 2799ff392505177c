"""How many operators a training step dispatches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import snf_ext

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import dispatches

LIMIT = 400  # of the 9-layer convolutional model


def test_counts_forward_backward_and_optimizer():
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)

    def step():
        optimizer.zero_grad()
        x.exp().sum().backward()
        optimizer.step()

    counts = dispatches.count(step)
    assert counts["aten::exp"] == counts["aten::sum"] == counts["aten::add_.Tensor"] == 1
    assert counts["aten::mul.Tensor"] == 1  # the backward of exp
    assert counts.total() >= 5


@pytest.mark.skipif(not snf_ext.build_info()["cpp"], reason="the native backend is not built")
def test_a_fused_operator_is_one():
    layer, x = snf_ext.SelfNormLinear(4), torch.randn(3, 4)

    def step():
        z, _, recon = layer(x)
        (z.sum() + recon.sum()).backward()

    with snf_ext.use_backend("native"):
        counts = dispatches.count(step)
    ours = {name: n for name, n in counts.items() if name.startswith("snf_ext::")}
    assert ours == {"snf_ext::snf_linear_forward": 1, "snf_ext::snf_linear_backward": 1}
    with snf_ext.use_backend("reference"):
        assert not any(name.startswith("snf_ext::") for name in dispatches.count(step))


@pytest.mark.skipif(not snf_ext.build_info()["cpp"], reason="the native backend is not built")
@pytest.mark.skipif(
    not hasattr(torch.ops.snf_ext, "rq_spline"),
    reason="the spline has no native operator in this build, only its hundreds in plain torch",
)
def test_step_of_the_convolutional_model():
    flow = snf_ext.models.conv().train()
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)
    x = torch.randint(256, (2, 1, 28, 28)).float()

    def step():
        optimizer.zero_grad()
        flow.loss(x).backward()
        optimizer.step()

    with snf_ext.use_backend("native"):
        counts = dispatches.count(step)
    assert counts.total() <= LIMIT, counts.most_common(20)
