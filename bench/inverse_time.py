"""What a training step takes by each way of keeping the learned inverse.

    python -m bench.inverse_time fc|conv|glow [--rounds 7] [--threads 1] [--device cpu] [--out FILE]

A step at batch 100 on 1x28x28 images, fused Adam included. A sample is 100 steps in a row, because
a tracked inverse is fitted in some steps alone; variants take turns, and the ratios are those of
the paper's way in the same round. On a GPU a step is a CUDA graph where it can be one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import snf_ext

from . import report
from .inverse_study import BATCH, MODELS, build
from .timing import machine_noise, quartiles, synchronise

STEPS = 100
PAPER = "penalty"
DEBIAS = snf_ext.Debias(2, 4)
COMMON: dict[str, dict[str, Any]] = {
    "exact": {"layer": "exact"},
    PAPER: {},
    "inverse-only": {"inverse": "inverse-only"},
    "tracked": {"inverse": "tracked"},
    "penalty, debiased": {"debias": DEBIAS},
    "tracked, debiased": {"inverse": "tracked", "debias": DEBIAS},
}
LARGER: dict[str, dict[str, Any]] = {
    f"{kept} {size}x{size}": {"inverse": kept, "inverse_kernel_size": size}
    for kept in (PAPER, "tracked")
    for size in (5, 7)
}


class Trainee:
    """One variant: a flow, its optimizer, and the seconds of a step in each round."""

    def __init__(self, model: str, settings: Mapping[str, Any], device: torch.device) -> None:
        self.flow = build(MODELS[model], settings, seed=0).train().to(device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.flow.parameters(), lr=1e-4, fused=True, capturable=on_gpu
        )
        self.step = snf_ext.GraphedStep(self.flow, self.optimizer)  # on a CPU an ordinary one
        self.wait = synchronise(device)
        self.seconds: list[float] = []

    def run(self, x: torch.Tensor, steps: int) -> None:
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(x)
        self.wait()
        self.seconds.append((time.perf_counter() - start) / steps)


def measure(model: str, rounds: int, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a variant."""
    variants = COMMON | (LARGER if model == "conv" else {})
    trainees = {name: Trainee(model, settings, device) for name, settings in variants.items()}
    x = torch.randint(256, (BATCH, 1, 28, 28)).float().to(device)
    for trainee in trainees.values():
        trainee.run(x, 6)  # and, on a GPU, the capture
        trainee.seconds.clear()
    for turn in range(rounds):
        names = list(trainees)
        for name in names if turn % 2 else names[::-1]:
            # The exact gradient is slow, and the same in every step.
            trainees[name].run(x, steps if name != "exact" else max(1, steps // 20))
    paper = trainees[PAPER].seconds
    rows = []
    for name, trainee in trainees.items():
        low, middle, high = quartiles(trainee.seconds)
        ratios = [a / b for a, b in zip(trainee.seconds, paper, strict=True)]
        rows.append(
            {
                "variant": name,
                "step_s": middle,
                "step_q1_s": low,
                "step_q3_s": high,
                "over_penalty": quartiles(ratios)[1],
                "graph": trainee.step.graphed,
            }
        )
        print(
            f"{name:<20}{middle * 1e3:>8.2f} ms [{low * 1e3:.2f} {high * 1e3:.2f}]"
            f"{rows[-1]['over_penalty']:>8.2f} times the penalty",
            flush=True,
        )
    return rows


def table(record: Mapping[str, Any]) -> str:
    """A line a variant."""
    lines = ["| variant | ms a step (quartiles) | of the penalty's |", "|---|---|---|"]
    lines += [
        f"| {row['variant']} | {row['step_s'] * 1e3:.1f} "
        f"({row['step_q1_s'] * 1e3:.1f} to {row['step_q3_s'] * 1e3:.1f}) "
        f"| {row['over_penalty']:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inverse_time")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    noise = machine_noise(device)
    print(f"{noise}; {args.threads} threads")
    command = f"python -m bench.inverse_time {args.model} --rounds {args.rounds}"
    command += f" --threads {args.threads}"
    if device.type != "cpu":
        command += f" --device {device}"
    environment = report.environment(command, device)
    rows = measure(args.model, args.rounds, args.steps, device)
    if args.out:
        record = {
            "suite": "inverse_time",
            "model": args.model,
            "environment": environment,
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(machine_noise(device)),
            "rows": rows,
        }
        report.write_json(args.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
