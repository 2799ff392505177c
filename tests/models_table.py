"""The one table of models: small ones of every kind, which the tests of models run over."""

from __future__ import annotations

import torch

from snf_ext import models

SMALL = (1, 8, 8)
MIXINGS = [*models.CONV, *models.CONV_1X1]
VARIANTS = {
    **{
        f"fc-{name}": lambda name=name, **k: models.fc(SMALL, 2, name, **k)
        for name in models.LINEAR
    },
    **{
        f"conv-{name}": lambda name=name, **k: models.conv(SMALL, 6, 3, name, **k)
        for name in models.CONV
    },
    "conv-5x5-inverse": lambda **k: models.conv(SMALL, 3, 3, inverse_kernel_size=5, **k),
    "conv-smooth": lambda **k: models.conv(SMALL, 2, 2, activation="smooth_leaky_relu", **k),
    **{
        f"glow-{name}": lambda name=name, **k: models.glow(SMALL, 2, 2, 8, name, **k)
        for name in MIXINGS
    },
    "glow-5x5": lambda **k: models.glow(SMALL, 1, 2, 8, "self_norm", 5, **k),
    "glow-additive": lambda **k: models.glow(SMALL, 2, 2, 8, "lu", coupling="additive", **k),
}


def build(name, dtype=torch.float64, **settings):
    """With weights a little off where they start, and actnorm initialised."""
    torch.manual_seed(2)
    flow = VARIANTS[name](**settings).to(dtype)
    context = torch.randn(16, flow.context_features, dtype=dtype) if flow.context_features else None
    with torch.no_grad():
        flow.loss(torch.randint(256, (16, *SMALL)).to(dtype), context)
        for p in flow.parameters():
            p += 0.02 * torch.randn_like(p)
    return flow


def images(batch=3, dtype=torch.float64):
    return torch.randint(256, (batch, *SMALL)).to(dtype)
