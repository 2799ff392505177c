"""A long training run in one process: does memory stay flat, and do cached values stay true?

    python -m bench.soak --out bench/results/soak-cpu.json

Two small flows, linear layers and convolutions with splines, take 50,000 steps each. Every 500
steps the process's resident memory is read, and exact log-determinants are compared:

    cached - recomputed    of the flow's likelihood, by its caches against those of a new copy
    cached - dense         of each layer, against the dense matrix of a float64 copy

in nats. Memory counts from the end of warm-up, a tenth of the steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from bench import report
from snf_ext import Flow, SelfNormConv2d, SelfNormLinear
from snf_ext.bijection import walk

SHAPE, LEVELS, BATCH = (1, 8, 8), 17, 16
STEPS, EVERY, WARMUP = 50_000, 500, 0.1
STATM = Path("/proc/self/statm")

FLOWS = {
    "fc": partial(snf_ext.models.fc, SHAPE, pixel_levels=LEVELS),
    "conv with splines": partial(snf_ext.models.conv, SHAPE, 3, pixel_levels=LEVELS),
}
GROWTH, DRIFT = 0.01, 1e-3  # what is allowed: a share, nats


@dataclass(frozen=True)
class Look:
    """What is seen at one step."""

    step: int
    resident_bytes: int
    loss: float
    nll: float
    drift: float  # cached - recomputed
    dense_drift: float  # cached - dense
    finite: bool


def resident_bytes() -> int:
    """Of this process, now."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def images() -> Tensor:
    """Blots, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(LEVELS, (256, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


def dense_log_abs_det(layer: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """Of the layer's matrix, column by column from its own forward pass."""
    wide = copy.deepcopy(layer).double().train()
    size = torch.Size(shape).numel()
    x = torch.cat((torch.zeros(1, size), torch.eye(size))).double().reshape(-1, *shape)
    with torch.no_grad():
        z = wide(x)[0].flatten(1)
    return float(torch.linalg.slogdet(z[1:] - z[:1]).logabsdet)


def drifts(flow: Flow, x: Tensor) -> tuple[float, float, float]:
    """NLL, and the largest differences to what is recomputed and to dense matrices."""
    with torch.no_grad():
        torch.manual_seed(0)  # of dequantization
        first = flow.log_prob(x)
        torch.manual_seed(0)
        cached = flow.log_prob(x)
        torch.manual_seed(0)
        again = copy.deepcopy(flow).log_prob(x)
    drift = float(torch.stack((first - cached, cached - again)).abs().max())
    dense = 0.0
    for layer, shape in walk(flow.bijections, flow.event_shape):
        if isinstance(layer, SelfNormLinear):
            exact = layer.log_abs_det()
        elif isinstance(layer, SelfNormConv2d):
            exact = layer.log_abs_det(shape[1:])
        else:
            continue
        dense = max(dense, abs(float(exact) - dense_log_abs_det(layer, shape)))
    return -float(cached.mean()), drift, dense


def soak(name: str, steps: int = STEPS, every: int = EVERY) -> Iterator[Look]:
    """Train, and look every so many steps."""
    torch.manual_seed(0)
    flow, data = FLOWS[name](), images()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True)
    for step in range(1, steps + 1):
        batch = data[torch.randint(len(data), (BATCH,))]
        optimizer.zero_grad()
        loss = flow.train().loss(batch)
        loss.backward()
        optimizer.step()
        if step % every:
            continue
        nll, drift, dense = drifts(flow.eval(), data[:BATCH])
        finite = all(bool(p.isfinite().all()) for p in flow.parameters())
        gc.collect()
        yield Look(step, resident_bytes(), loss.item(), nll, drift, dense, finite)


def judged(looks: Sequence[Look], warmup: float = WARMUP) -> dict[str, Any]:
    """Growth from the end of warm-up to the end, and whether all is as it must be."""
    after = [look for look in looks if look.step > warmup * looks[-1].step]
    growth = after[-1].resident_bytes / after[0].resident_bytes - 1
    drift = max(look.drift for look in looks)
    dense = max(look.dense_drift for look in looks)
    finite = all(look.finite for look in looks)
    return {
        "warm_bytes": after[0].resident_bytes,
        "end_bytes": after[-1].resident_bytes,
        "most_bytes": max(look.resident_bytes for look in after),
        "growth": growth,
        "drift_nats": drift,
        "dense_drift_nats": dense,
        "finite": finite,
        "met": growth < GROWTH and drift < DRIFT and dense < DRIFT and finite,
    }


def measure(name: str, steps: int, every: int) -> dict[str, Any]:
    """One row of the result."""
    begun = time.perf_counter()
    looks = list(soak(name, steps, every))
    row = {"flow": name, "steps": steps, "seconds": time.perf_counter() - begun}
    row |= judged(looks) | {"loss": [looks[0].loss, looks[-1].loss]}
    # Some tenth of the looks, for the curve.
    return row | {"looks": [asdict(look) for look in looks[:: max(1, len(looks) // 10)]]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write JSON if asked to; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    environment = report.environment(" ".join(["python -m bench.soak", *words]))
    record: dict[str, Any] = {"suite": "soak", "environment": environment, "rows": []}
    for name in FLOWS:
        row = measure(name, args.steps, args.every)
        record["rows"].append(row)
        print(
            f"{name}: {row['steps']} steps in {row['seconds']:.0f} s, resident "
            f"{row['warm_bytes'] / 1e6:.1f} MB warm, {row['end_bytes'] / 1e6:.1f} MB at the end "
            f"({100 * row['growth']:+.3f} %), cached - recomputed {row['drift_nats']:.2g} nats, "
            f"- dense {row['dense_drift_nats']:.2g}, {'met' if row['met'] else 'NOT MET'}",
            flush=True,
        )
        if args.out:
            report.write_json(args.out, record)
    return 0 if all(row["met"] for row in record["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
