"""Controllers of the reconstruction penalty's weight, beside fixed weights.

    python -m bench.controllers --model fc|conv|glow --data-dir DIR [--steps 1500] --out FILE.json

Each run trains one of the paper's models on MNIST from its default start with the settings of SNF
A.3: Adam, batches of 100 in the order of the file, the rate warmed up over 10 epochs of 500 steps.
Glow is that of Table 5: two levels of four steps, width 16. Nothing but the controller differs, and
no controller is told a lambda, except the run that starts at 0.01.

Every 50 steps the JSON has, for each layer, lambda and the largest relative error of those steps
(E||e||^2 / E||x||^2, a running average over some ten batches); at the end the exact NLL of the last
10,000 training images, in nats. A run that is not finite ends there and has none. The file is
written after each run, and runs that it has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.constraint import controllers
from snf_ext.controllers import CONTROLLERS, KAPPA, Controller, Fixed

from . import report
from .mnist import exact_nll, read_images

BATCH, WARM_UP, EVERY, SETTLED = 100, 5000, 50, 500

MODELS: dict[str, tuple[Callable[[], snf_ext.Flow], float]] = {
    "fc": (snf_ext.models.fc, 1e-4),
    "conv": (snf_ext.models.conv, 1e-3),
    "glow": (lambda: snf_ext.models.glow(levels=2, steps=4, width=16), 1e-3),
}

DEFAULT, FROM_BELOW = "relative", "relative, from 0.01"
RUNS: dict[str, Callable[[], Controller]] = {
    DEFAULT: snf_ext.Relative,
    FROM_BELOW: lambda: snf_ext.Relative(recon_weight=0.01),
    **{f"fixed {w:g}": lambda w=w: Fixed(w) for w in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)},
    **{name: make for name, make in CONTROLLERS.items() if name != DEFAULT},
}
COMPARED = ("fixed 1", "fixed 10", "fixed 100", "fixed 1000")


def train(
    flow: snf_ext.Flow, rate: float, images: Tensor, validation: Tensor, steps: int
) -> dict[str, Any]:
    """Train ``flow``, which has controllers; traces, and the exact NLL if it stayed finite."""
    flow.train()
    snf_ext.initialize(flow, [images[:BATCH].float()])
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate, fused=True)
    held = list(controllers(flow).values())
    trace: dict[str, list[Any]] = {"step": [], "error": [], "recon_weight": []}
    seconds, diverged = [], None
    largest = torch.zeros(len(held))
    for step, batch in enumerate(islice(cycle(images.split(BATCH)), steps), start=1):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARM_UP)
        optimizer.zero_grad()
        loss = flow.loss(batch.float())
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        largest = torch.maximum(largest, torch.stack([c.error for c in held]))
        if not math.isfinite(loss.item()):
            diverged = step
            break
        if step % EVERY == 0:
            trace["step"].append(step)
            trace["error"].append(largest.tolist())
            trace["recon_weight"].append([c.recon_weight.item() for c in held])
            largest.zero_()
    nll = None if diverged else exact_nll(flow, validation)
    return {
        "nll": nll if nll is not None and math.isfinite(nll) else None,
        "diverged_at": diverged,
        "step_s": statistics.median(seconds),
        "layers": list(controllers(flow)),
        "trace": trace,
    }


def judged(row: dict[str, Any], kappa: float) -> dict[str, Any]:
    """What the trace says: the largest error once settled, and where lambda went."""
    trace = row["trace"]
    late = [max(e) for s, e in zip(trace["step"], trace["error"], strict=True) if s > SETTLED]
    weights = list(zip(*trace["recon_weight"], strict=True))
    pairs = [(a, b) for layer in weights for a, b in pairwise(layer)]
    return {
        "largest_error": max(late, default=None),
        "largest_error_in_kappa": max(late) / kappa if late else None,
        "rises": any(b > a for a, b in pairs),
        "falls": any(b < a for a, b in pairs),
        "last_recon_weight": trace["recon_weight"][-1] if trace["recon_weight"] else None,
    }


def table(record: Mapping[str, Any]) -> str:
    """A line a run."""
    lines = [
        f"| run | exact NLL | largest error after step {SETTLED}, of κ | λ at the end |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        nll = "diverged" if row["nll"] is None else f"{row['nll']:.1f}"
        error = row["largest_error_in_kappa"]
        weights = row["last_recon_weight"] or [math.nan]
        moves = " and ".join(word for word in ("rises", "falls") if row[word]) or "fixed"
        lines.append(
            f"| {row['run']} | {nll} | {'' if error is None else f'{error:.3g}'} "
            f"| {min(weights):.2g} to {max(weights):.2g}, {moves} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = read_images(args.data_dir)
    training, validation = images[:-10_000][:50_000], images[-10_000:]
    if len(training) < BATCH:
        print(f"MNIST's 60,000 training images are needed; got {len(images)}", file=sys.stderr)
        return 2
    settings = {"model": args.model, "steps": args.steps, "seed": args.seed, "kappa": KAPPA}
    command = f"python -m bench.controllers --model {args.model}"
    command += f" --steps {args.steps} --seed {args.seed}"
    result: dict[str, Any] = {
        "suite": "controllers",
        "settings": settings,
        "environment": report.environment(command),
        "rows": _earlier(args.out, settings),
    }
    make, rate = MODELS[args.model]
    for name in args.only or RUNS:
        if any(row["run"] == name for row in result["rows"]):
            continue
        torch.manual_seed(args.seed)
        flow = snf_ext.constrain(make(), RUNS[name]())
        row = {"run": name, **train(flow, rate, training, validation, args.steps)}
        result["rows"].append(row | judged(row, KAPPA))
        report.write_json(args.out, result)
        _print(result["rows"][-1])
    _print_table(result["rows"])
    return 0


def _earlier(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run that was cut off."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["settings"] != settings:
        raise SystemExit(f"--out must be new or of {settings}; {path} is of {earlier['settings']}")
    return earlier["rows"]


def _print(row: dict[str, Any]) -> None:
    nll = f"diverged at step {row['diverged_at']}" if row["nll"] is None else f"{row['nll']:.1f}"
    error = row["largest_error_in_kappa"]
    weights = row["last_recon_weight"] or [math.nan]
    moves = " and ".join(word for word in ("rises", "falls") if row[word]) or "fixed"
    print(
        f"{row['run']:<26}{nll:>12}  {math.nan if error is None else error:>12.3g}  "
        f"{min(weights):.3g} .. {max(weights):.3g}, {moves}; {row['step_s'] * 1e3:.1f} ms/step",
        flush=True,
    )


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'run':<26}{'exact NLL':>12}  {'error/kappa':>12}  lambda at the end")
    for row in rows:
        _print(row)
    nll = {row["run"]: row["nll"] for row in rows if row["nll"] is not None}
    fixed = [nll[name] for name in COMPARED if name in nll]
    for name in (DEFAULT, FROM_BELOW):
        if fixed and name in nll:
            percent = 100 * (nll[name] / min(fixed) - 1)
            print(f"{name}: {percent:+.2f} % of the best fixed lambda of 1, 10, 100, 1000")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.controllers", description="Controllers beside fixed weights."
    )
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(RUNS), nargs="+", help="some of the runs")
    parser.add_argument("--out", type=Path, metavar="FILE.json", required=True)
    args = parser.parse_args(arguments)
    if args.steps < EVERY:
        parser.error(f"--steps must be at least {EVERY}; got {args.steps}")
    return args


if __name__ == "__main__":
    sys.exit(main())
