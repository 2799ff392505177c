"""One layer by its size, each way of doing it on its own: the paper's Figure 4."""

from __future__ import annotations

import pytest

from bench.cases import ConvCase, LinearCase
from bench.figure4 import FIGURE4
from bench.steps import conv_variants, linear_variants
from bench.test_conv import VARIANTS as CONV_VARIANTS
from bench.test_linear import VARIANTS as LINEAR_VARIANTS


@pytest.mark.parametrize("variant", [*LINEAR_VARIANTS, "native, given gradients"])
@pytest.mark.parametrize(
    "case", [c for c in FIGURE4 if isinstance(c, LinearCase)], ids=lambda case: case.name
)
def test_linear_by_size(run, case, variant):
    run(case, variant, linear_variants)


@pytest.mark.parametrize("variant", CONV_VARIANTS)
@pytest.mark.parametrize(
    "case", [c for c in FIGURE4 if isinstance(c, ConvCase)], ids=lambda case: case.name
)
def test_convolution_by_size(run, case, variant):
    run(case, variant, conv_variants)
