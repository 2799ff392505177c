"""A training step of the fully connected model with Adam, each way of doing it on its own."""

from __future__ import annotations

import pytest

from bench.cases import MODELS
from bench.steps import model_variants

VARIANTS = (
    "native",
    "native, fused Adam",
    "reference",
    "reference, fused Adam",
    "compiled reference",
    "composed, DxD base",
    "composed, normal base",
    "1024^3 product",
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_model(run, case, variant):
    run(case, variant, model_variants)
