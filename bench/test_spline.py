"""One rational-quadratic spline, forward and backward, each way of doing it on its own."""

from __future__ import annotations

import pytest

from bench.cases import SPLINE
from bench.spline import spline_variants

VARIANTS = ("native", "reference", "compiled reference", "nflows", "normflows", "zuko")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SPLINE, ids=lambda case: case.name)
def test_spline(run, case, variant):
    run(case, variant, spline_variants)
