"""What one probe of a stochastic log-determinant is worth, beside the exact one.

    python -m bench.stochastic_log_det [--probes 200] [--out F.json]

The usual estimator without an inverse is the power series of log(I + N) with Hutchinson's trace,

    log|det(I + N)| = sum over k of (-1)^(k+1) / k tr N^k,   tr A = E[v' A v]

cut off after K = 10 terms, v of independent signs; N is a 3x3 convolution less the identity. The
kernels are the identity plus Gaussian noise of norm 0.3 a channel, where the series converges well.
Printed: the deviation of one probe, the bias of the cut, and how many probes reach 0.08 nats (the
step between digits of the papers' tables); the exact value and the time of both.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from snf_ext import exact

from . import report

SHAPES = [(1, 28, 28), (4, 14, 14), (16, 7, 7), (3, 32, 32)]
TERMS, WANTED = 10, 0.08


def estimate(weight: torch.Tensor, size: tuple[int, int], probes: int, terms: int) -> torch.Tensor:
    """The estimate of each probe, in nats, ``(probes,)``."""
    shift = weight.clone()
    channels = torch.arange(len(weight))
    shift[channels, channels, 1, 1] -= 1
    v = torch.randint(2, (probes, len(weight), *size), dtype=weight.dtype) * 2 - 1
    power, total = v, torch.zeros(probes, dtype=weight.dtype)
    for k in range(1, terms + 1):
        power = F.conv2d(power, shift, padding=1)
        total += (-1) ** (k + 1) / k * (v * power).flatten(1).sum(1)
    return total


def measure(shape: tuple[int, int, int], probes: int) -> dict[str, Any]:
    """One row of the result."""
    channels, *size = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
    weight *= 0.3 / math.sqrt(9 * channels)
    weight[torch.arange(channels), torch.arange(channels), 1, 1] += 1
    geometry = ((size[0], size[1]), 1, 1, False)
    exact.factorize_conv2d(weight, *geometry)
    start = time.perf_counter()
    true = exact.factorize_conv2d(weight, *geometry).log_abs_det.item()
    exact_s = time.perf_counter() - start
    torch.manual_seed(0)
    estimate(weight, (size[0], size[1]), 1, TERMS)
    start = time.perf_counter()
    values = estimate(weight, (size[0], size[1]), probes, TERMS)
    probe_s = (time.perf_counter() - start) / probes
    deviation = values.std().item()
    return {
        "case": "x".join(map(str, shape)),
        "log_abs_det": true,
        "mean": values.mean().item(),
        "deviation": deviation,
        "probes_for_0.08_nats": math.ceil((deviation / WANTED) ** 2),
        "exact_s": exact_s,
        "probe_s": probe_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.stochastic_log_det", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    if args.probes < 2:
        parser.error(f"--probes must be at least 2; got {args.probes}")
    print("shape     log|det|      mean  deviation  probes for 0.08  exact, ms  one probe, ms")
    rows = []
    for shape in SHAPES:
        row = measure(shape, args.probes)
        rows.append(row)
        print(
            f"{row['case']:<8} {row['log_abs_det']:>9.3f} {row['mean']:>9.3f} "
            f"{row['deviation']:>10.2f} {row['probes_for_0.08_nats']:>16} "
            f"{row['exact_s'] * 1e3:>10.2f} {row['probe_s'] * 1e3:>14.2f}",
            flush=True,
        )
    if args.out:
        command = f"python -m bench.stochastic_log_det --probes {args.probes}"
        result = {"suite": "stochastic_log_det", "environment": report.environment(command)}
        report.write_json(args.out, result | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
