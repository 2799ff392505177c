"""One convolution layer, forward and backward, each way of doing it on its own."""

from __future__ import annotations

import pytest

from bench.cases import CONV
from bench.steps import conv_variants

VARIANTS = (
    "native",
    "reference",
    "compiled reference",
    "composed",
    "exact",
    "exact (dense)",
    "stock products",
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CONV, ids=lambda case: case.name)
def test_conv(run, case, variant):
    run(case, variant, conv_variants)
