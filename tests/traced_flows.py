"""The flows that the tests of tracing run over: the models' rows, zuko's among them."""

from __future__ import annotations

import pytest
import torch
from models_table import VARIANTS, build

from snf_ext import Dequantize, Flow, models

ZUKO = ("maf", "nice")
ROWS = [*VARIANTS, *(f"autoregressive-{family}" for family in ZUKO)]
# A row of each kind, for what is too long for all of them.
SOME = ["fc-self_norm", "conv-self_norm", "glow-self_norm"]
USES = ("loss", "log_prob", "sample", "sample-exact")


def marked(rows, fast, slow):
    """Rows that run always, those that take seconds, and in nightly runs the rest."""
    kinds = [(fast, ()), (slow, pytest.mark.slow), (lambda name: True, pytest.mark.nightly)]
    return [
        pytest.param(row, marks=next(m for chosen, m in kinds if chosen(name)), id=name)
        for row in rows
        for name in [getattr(row, "name", row)]
    ]


def flow_of(name: str, dtype=torch.float64, *, noisy: bool = False) -> Flow:
    """The model of a row; ``noisy``: with the dequantization, which draws noise, before it."""
    kind, _, family = name.partition("-")
    if kind == "autoregressive":
        pytest.importorskip("zuko", reason="zuko is not installed")
        torch.manual_seed(2)
        flow = models.autoregressive((1, 2, 3), family, 2, 8).to(dtype)
    else:
        flow = build(name, dtype)
    if noisy:
        return flow
    rest = [part for part in flow.bijections if not isinstance(part, Dequantize)]
    return Flow(rest, flow.event_shape, flow.recon_weight)


def function_of(flow: Flow, use: str):
    """What the use calls, in its mode, and a batch of what it takes."""
    flow.train(use == "loss")
    if use in ("loss", "log_prob"):
        shape = flow.event_shape
        return getattr(flow, use), lambda n: _draw(n, shape, flow, pixels=True)
    exact = use == "sample-exact"

    def sample(z):
        return flow.inverse(z, exact=exact)

    return sample, lambda n: _draw(n, flow.latent_shape, flow, pixels=False)


def _draw(n: int, shape: tuple[int, ...], flow: Flow, pixels: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    draw = torch.rand if pixels else torch.randn
    x = draw(n, *shape, generator=generator, dtype=torch.float64)
    return (x * 250 + 1 if pixels else x).to(next(flow.parameters()).dtype)
