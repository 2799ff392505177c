"""How much memory an exact value takes at its peak, in a process of its own on one thread.

    python -m bench.exact_memory CASE

measures the case of that name and prints bytes. Peak is Linux' VmHWM at the end of the step, over
the resident memory before it: what the weight, the right-hand sides and the libraries take is not
counted, nor what a first call to LAPACK leaves, which a small step made before.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .exact import exact_variants
from .exact_cases import MEMORY, ExactCase, MemoryCase

__all__ = ["measure", "words"]

STATUS = Path("/proc/self/status")


def measure(case: MemoryCase) -> dict[str, Any]:
    """The row of a case, which is also printed.

    Raises:
        RuntimeError: the other process fails, or this is no Linux.
    """
    command = [sys.executable, "-m", "bench.exact_memory", case.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        ended = f"the process ended with exit status {done.returncode}"
        raise RuntimeError("\n".join([ended, *done.stderr.strip().splitlines()[-1:]]))
    row = {
        "case": case.exact.name,
        "variant": case.variant,
        "bytes": int(done.stdout),
        "plan_bytes": case.exact.plan.bytes,
        "dense_matrix_bytes": case.exact.plan.dense_bytes,
        "limit_bytes": case.limit,
    }
    row["met"] = None if case.limit is None else row["bytes"] <= case.limit
    print(f"memory of {row['case']}, {words(row)}\n", flush=True)
    return row


def words(row: Mapping[str, Any]) -> str:
    text = f"{row['variant']}: {row['bytes'] / 1e6:.1f} MB"
    text += f" (one dense matrix: {row['dense_matrix_bytes'] / 1e6:.1f} MB)"
    if row["limit_bytes"] is not None:
        text += f", wanted <= {row['limit_bytes'] / 1e6:g} MB"
    return text


def peak_growth(case: ExactCase, variant: str) -> int:
    """Bytes that the operation takes in this process at its peak, at most."""
    small = dataclasses.replace(case, height=16, width=16)  # blocks, as the large one
    _step(small, variant)()
    step = _step(case, variant)
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _step(case: ExactCase, variant: str) -> Any:
    return next(v.step for v in exact_variants(case) if v.name.startswith(variant))


def _resident(field: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        raise RuntimeError(f"memory is measured through {STATUS}, which is not there") from None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = next(case for case in MEMORY if case.name == sys.argv[1])
    print(peak_growth(chosen.exact, chosen.variant))
