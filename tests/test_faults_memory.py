"""Out of memory in forward and backward: an exception, and a process that is as good as before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import starved
from cli_runs import environment
from conftest import needs_native

STARVED = Path(starved.__file__)
KINDS = {"RuntimeError", "MemoryError"}


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "conv2d",
        *(pytest.param(n, marks=pytest.mark.slow) for n in list(starved.LAYERS)[2:]),
    ],
)
def test_a_process_that_was_refused_memory_goes_on(name):
    """At a dozen moments, by two threads: the numbers afterwards are the same bits."""
    done = subprocess.run(
        [sys.executable, STARVED, name],
        capture_output=True,
        text=True,
        env=environment() | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    count, *kinds = done.stdout.removeprefix(name).split()
    assert 3 <= int(count) <= starved.STEPS  # the limit is felt
    assert set(kinds) <= KINDS
