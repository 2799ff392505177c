"""One fully connected layer, forward and backward, each way of doing it on its own."""

from __future__ import annotations

import pytest

from bench.cases import LINEAR
from bench.steps import linear_variants

VARIANTS = (
    "native",
    "reference",
    "compiled reference",
    "composed",
    "exact",
    "relative",
    "products (fresh)",
    "products (out=)",
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear(run, case, variant):
    run(case, variant, linear_variants)
