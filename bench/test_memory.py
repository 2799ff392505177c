"""A training step's time beside its memory, each way of doing it on its own.

What pytest-benchmark saves has ``saved_bytes`` and ``peak_bytes`` of each, which
``python -m bench.memory`` puts in a table.
"""

from __future__ import annotations

import pytest

from bench.memory import CASES, count, memory_variants

VARIANTS = (
    "native",
    "native, reversible",
    "reference",
    "reference, reversible",
    "composed",
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory(run, benchmark, request, case, variant):
    run(case, variant, memory_variants)
    benchmark.extra_info |= count(case, variant, request.config.getoption("--device"))
