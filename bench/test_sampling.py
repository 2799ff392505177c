"""Samples of a model by its learned inverse, each way of drawing them on its own."""

from __future__ import annotations

import pytest

from bench.sampling import SAMPLING, sample_variants


@pytest.mark.parametrize("variant", ["native", "reference", "composed", "exact inverse"])
@pytest.mark.parametrize("case", SAMPLING, ids=lambda case: case.name)
def test_samples(run, case, variant):
    run(case, variant, sample_variants)
