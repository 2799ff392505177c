"""The benchmark of monitor and guard: five times the same step, and a stub that is one."""

import pytest
import torch

import snf_ext
from bench import monitor
from snf_ext import exact


@pytest.mark.parametrize("model", ["conv", "fc"])
def test_all_variants_train_the_same(model, monkeypatch):
    flows, make = [], getattr(snf_ext.models, model)
    monkeypatch.setattr(snf_ext.models, model, lambda shape: flows.append(make(shape)) or flows[-1])
    for variant in monitor.variants(model, (1, 8, 8)):
        torch.manual_seed(1)
        with variant.context():
            variant.step()
    plain, *others = (list(flow.parameters()) for flow in flows)
    assert len(others) == 4
    for other in others:
        assert all(map(torch.equal, plain, other))


def test_free_log_dets_are_put_back():
    weight = 2 * torch.eye(3)
    with monitor.free_log_dets():
        assert exact.linear_log_abs_det(weight) == 6
    assert exact.linear_log_abs_det(weight) == pytest.approx(3 * 0.6931472)
