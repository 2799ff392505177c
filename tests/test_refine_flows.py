"""Refined inverses of whole flows, whose layers refine at any depth."""

from __future__ import annotations

import pytest
import torch
from bijections_table import BIJECTIONS

import snf_ext
from snf_ext import Flow, InverseNotConverged, SelfNormConv2d, SelfNormLinear, SmoothLeakyReLU


def deep_flow():
    """Learned inverses at three depths, an exact one among them."""
    inner = snf_ext.SplitPrior((4, 2, 2), [SelfNormConv2d(2, 3), snf_ext.Flatten((2, 2, 2))], 4)
    rest = [snf_ext.Squeeze(), SelfNormConv2d(4, 3), SmoothLeakyReLU(0.5), inner]
    steps = [
        SelfNormConv2d(2, 3, inverse_kernel_size=5),
        snf_ext.ActNorm(2),
        snf_ext.SplitPrior((2, 4, 4), rest, 4),
        SelfNormLinear(32),
        snf_ext.ExactLinear(32),
    ]
    return Flow(steps, (2, 4, 4))


def slightly_trained(flow):
    """With inverses that are learned, and then made worse."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    mixing = torch.randn(32, 32) / 6 + torch.eye(32)
    for _ in range(30):
        optimizer.zero_grad()
        x = (torch.randn(64, 32) @ mixing).reshape(64, 2, 4, 4)
        flow.loss(x).backward()
        optimizer.step()
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if name.endswith("weight_inv"):
                p += 0.02 * torch.randn_like(p)
    return flow.eval()


def test_a_trained_flow_is_inverted_at_any_depth():
    flow = slightly_trained(deep_flow())
    layers = [m for m in flow.modules() if hasattr(m, "weight_inv")]
    assert len(layers) == 4
    with torch.no_grad():
        z = flow(torch.randn(16, 2, 4, 4)).z
        want = flow.inverse(z, exact=True)
        assert (flow.inverse(z) - want).abs().max() > 1e-2, "R is imperfect"
        assert torch.equal(flow.inverse(z, refine=0), flow.inverse(z))
        few, many = flow.inverse(z, refine=1), flow.inverse(z, refine=100)
    assert (few - want).abs().max() < 0.5 * (flow.inverse(z) - want).abs().max()
    torch.testing.assert_close(many, want, rtol=1e-5, atol=1e-5)
    samples = []
    for options in ({"exact": True}, {"refine": 100}):
        torch.manual_seed(9)
        samples.append(flow.sample(8, temperature=0.8, **options))
    torch.testing.assert_close(*samples, rtol=1e-5, atol=1e-5)


def test_a_nested_layer_warns():
    flow = deep_flow().eval()
    inner = flow.bijections[2].rest[3].rest[0]
    with torch.no_grad():
        inner.weight_inv.mul_(4)
    with pytest.warns(InverseNotConverged, match=r"SelfNormConv2d\(2, .* Use exact=True") as caught:
        flow.sample(5, refine=4)
    assert len(caught) == 1


def test_every_bijection_that_refines_says_so():
    for case in BIJECTIONS:
        bijection = case.make()
        nests = isinstance(bijection, snf_ext.SplitPrior)
        assert bijection.refines == (case.learned or nests), case.name
