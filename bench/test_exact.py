"""Exact values of one convolution, each way of computing them on its own."""

from __future__ import annotations

import pytest

from bench.exact import exact_variants
from bench.exact_cases import EXACT

VARIANTS = ("package (blocks)", "package (fourier)", "dense", "band")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_exact(run, case, variant):
    run(case, variant, exact_variants)
