"""What keeps Glow stable on natural images: cumulative actnorm and the log-determinant penalty.

    python -m bench.sfm_stability --data FILE.npz --out FILE.json --plot FILE.png

Runs of Glow with LU mixing, trained by RAdam in bits/dim as in SFM, on fewer layers than there so
that a CPU does it in minutes:

- actnorm: batches of one image, started from the first image or from 256 images (SFM 4.2, Figures
  4 and 5);
- penalty: batches of 8 at a learning rate where training without the penalty diverges within 400
  steps, with and without it (SFM 4.1, Table 2), and what becomes of the determinants.

A run ends as diverged where its objective is not finite or over 1,000 bits/dim; the loop is that of
:mod:`snf_ext.experiments.stability`.

Source: Tatsunami and Taki, "Methods for stabilizing flow-based generative models" (SFM).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from snf_ext.experiments.stability import DIVERGED, Run, train
from snf_ext.training.checkpoint import write_aside
from snf_ext.training.data import load_images

from . import report

__all__ = ["DIVERGED", "RUNS", "Run", "draw", "main", "train"]

ONE = {"experiment": "actnorm", "batch_size": 1, "lr": 1e-5, "penalty": 1e-3}
MANY = {
    "experiment": "penalty",
    "batch_size": 8,
    "lr": 6e-2,
    "init_images": 64,
    "levels": 3,
    "steps": 8,
    "width": 32,
}
RUNS = (
    Run(name="first image", init_images=1, **ONE),
    Run(name="256 images", init_images=256, **ONE),
    *(
        Run(name=f"penalty {penalty:g}", penalty=penalty, **MANY)
        for penalty in (0.0, 1e-7, 1e-6, 1e-5)
    ),
)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bits/dim of the runs by step, and the couplings' outputs after one update."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    figure.suptitle(report.headline(result["environment"]), fontsize=9)
    for run in result["runs"]:
        settings = run["settings"]
        first = settings["experiment"] == "actnorm"
        bits = [b for b in run["bits_per_dim"] if b is not None]
        label = settings["name"]
        if run["diverged_at"] is not None:
            label += f" (diverged at step {run['diverged_at']})"
        panels[0 if first else 2].plot(bits, label=label, marker="." if len(bits) < 20 else None)
        if first:
            outputs = run["largest_outputs_after_one_update"]
            numbered = [(i + 1, v) for i, v in enumerate(outputs) if v is not None]
            panels[1].plot(*zip(*numbered, strict=True), label=settings["name"])
    titles = (
        "actnorm started from (batch size 1)",
        "largest |output| of each coupling after one update",
        "log-determinant penalty",
    )
    for axes, title, across in zip(panels, titles, ("step", "coupling", "step"), strict=True):
        axes.set(title=title, xlabel=across)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("bits/dim")
    with write_aside(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = load_images(args.data).train
    generator = torch.Generator().manual_seed(args.seed)
    images = images[torch.randperm(len(images), generator=generator)]
    command = f"python -m bench.sfm_stability --updates {args.updates} --seed {args.seed}"
    result: dict[str, Any] = {
        "suite": "sfm_stability",
        "environment": report.environment(command),
        "runs": [],
    }
    for settings in RUNS:
        if args.only and settings.experiment != args.only:
            continue
        run = train(settings, images, args.updates, args.seed)
        result["runs"].append(run)
        _print(run)
        if args.out:
            report.write_json(args.out, result)
    if args.plot:
        draw(json.loads(json.dumps(result)), args.plot)
    return 0


def _print(run: Mapping[str, Any]) -> None:
    settings, bits = run["settings"], run["bits_per_dim"]
    outputs = [v for v in run["largest_outputs_after_one_update"] if v is not None]
    end = f"diverged at step {run['diverged_at']}" if run["diverged_at"] is not None else "finite"
    last = [b for b in bits[-50:] if b is not None]
    print(
        f"{settings['experiment']}, {settings['name']}: {end}; bits/dim {bits[0]:.3g} at first, "
        f"{sum(last) / len(last):.4g} over the last {len(last)} steps; largest |output| after one "
        f"update {max(outputs, default=math.nan):.3g}, sum of squared log-determinants at the end "
        f"{run['squared_log_dets']['last']:.3g}; {run['seconds'] / len(bits):.2f} s/step",
        flush=True,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sfm_stability", description="Stable Glow on natural images."
    )
    parser.add_argument("--data", type=Path, required=True, help="an .npz file of images")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["actnorm", "penalty"], help="one of the experiments")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.updates < 2:
        parser.error(f"--updates must be at least 2; got {args.updates}")
    return args


if __name__ == "__main__":
    sys.exit(main())
