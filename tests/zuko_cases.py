"""zuko's families as bijections, off their start, and what goes into them."""

from __future__ import annotations

import pytest
import torch

from snf_ext.adapters import ZukoBijection
from snf_ext.adapters.families import FAMILIES

D, C = 5, 3
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family, context_features=0, dtype=torch.float64, **sizes):
    sizes = {"features": D, "layers": 2, "width": 16} | sizes
    features = sizes["features"]
    lazy = FAMILIES[family].build(features, context_features, sizes["layers"], sizes["width"])
    bijection = ZukoBijection(lazy, features, context_features).to(dtype)
    with torch.no_grad():  # off the start, where some rows are the identity
        for p in bijection.parameters():
            p += 0.1 * torch.randn_like(p)
    return bijection.eval()


def inputs(context_features=0, batch=6, dtype=torch.float64):
    x = torch.randn(batch, D, dtype=dtype)
    return x, torch.randn(batch, C, dtype=dtype) if context_features else None
