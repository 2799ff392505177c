"""An ordinary and a reversible flow side by side, and what has to be the same of both."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import snf_ext
from snf_ext import Reversible
from snf_ext.bijection import FlowStep, per_sample_zeros

GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-4}

MODELS = {
    "fc": lambda: snf_ext.models.fc((1, 8, 8), layers=3),
    "fc-exact": lambda: snf_ext.models.fc((1, 4, 4), linear="exact"),
    "fc-relative": lambda: snf_ext.models.fc((1, 4, 4), linear="relative"),
    "fc-tracked": lambda: snf_ext.models.fc((1, 8, 8), inverse="tracked"),
    "fc-symmetric": lambda: snf_ext.models.fc((1, 4, 4), inverse="symmetric"),
    "fc-debiased": lambda: snf_ext.models.fc((1, 8, 8), inverse="tracked", debias=2),
    "fc-conditional": lambda: snf_ext.models.fc((1, 4, 4), context_features=3),
    "conv": lambda: snf_ext.models.conv((1, 8, 8), layers=6, inverse_kernel_size=5),
    "conv-exponential": lambda: snf_ext.models.conv((1, 4, 4), 3, conv="exponential"),
    "conv-emerging": lambda: snf_ext.models.conv((1, 4, 4), 3, conv="emerging"),
    "conv-debiased": lambda: snf_ext.models.conv((1, 8, 8), 3, debias=1, inverse="inverse-only"),
    "glow": lambda: snf_ext.models.glow((1, 8, 8), levels=3, steps=2, width=6),
    "glow-conditional": lambda: snf_ext.models.glow(
        (2, 4, 4), 2, 2, 6, "lu", coupling="additive", context_features=3
    ),
}


def twins(flow, dtype=torch.float64, how=None):
    """A flow away from where it starts, and the same as a reversible one."""
    flow = flow.to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.02 * torch.randn_like(p) / max(1, p[:1].numel()) ** 0.5
    reversible = copy.deepcopy(flow)
    reversible.reversible = how or Reversible()
    return flow, reversible


def images(flow, batch=5, dtype=torch.float64):
    x = torch.randint(flow.bijections[0].levels, (batch, *flow.event_shape)).to(dtype)
    k = flow.context_features
    return (x, torch.randn(batch, k, dtype=dtype).requires_grad_()) if k else (x,)


def gradients(flow, function, *inputs):
    """The value of a pass, and the gradients of parameters and inputs, all drawn from one seed."""
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    flow.zero_grad()
    torch.manual_seed(3)
    value = function(flow, *inputs)
    value.backward()
    tensors = {**dict(flow.named_parameters()), **dict(enumerate(inputs))}
    return value.detach(), {name: t.grad for name, t in tensors.items() if t.grad is not None}


def assert_same(ordinary, reversible, function, *inputs):
    """Value and state to the bit; gradients to the error of what is rebuilt."""
    value, want = gradients(ordinary, function, *inputs)
    assert want
    got_value, got = gradients(reversible, function, *inputs)
    assert torch.equal(value, got_value)
    assert want.keys() == got.keys()
    tolerance = GRADIENT[next(ordinary.parameters(), value).dtype]
    largest = max(g.norm() for g in want.values())
    for name, g in want.items():
        assert (got[name] - g).norm() <= tolerance * max(g.norm(), 1e-6 * largest), name
    assert_same_state(ordinary, reversible)


def assert_same_state(ordinary, reversible):
    want, got = ordinary.state_dict(), reversible.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(t, got[name]) for name, t in want.items())


def loss(flow, *inputs):
    return flow.loss(*inputs)


def likelihood(flow, *inputs):
    return flow.log_prob(*inputs).mean()


class Watched(snf_ext.Bijection):
    """Remembers its inputs, as long as anybody else does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.inputs = []

    def forward(self, x, context=None):
        self.inputs.append(StorageWeakRef(x.untyped_storage()))
        zeros = per_sample_zeros(x)
        log_det = zeros + math.prod(x.shape[1:]) * self.scale.log()
        return FlowStep(x * self.scale, log_det, zeros)

    def inverse(self, z, context=None, exact=False):
        return z / self.scale
