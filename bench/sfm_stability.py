"""What keeps Glow stable on natural images: cumulative actnorm and the log-determinant penalty.

    python -m bench.sfm_stability --data FILE.npz --out FILE.json --plot FILE.png

Runs of Glow with LU mixing, trained by RAdam in bits/dim as in SFM, on fewer layers than there so
that a CPU does it in minutes:

- actnorm: batches of one image, started from the first image or from 256 images (SFM 4.2, Figures
  4 and 5);
- penalty: batches of 8 at a learning rate where training without the penalty diverges within 400
  steps, with and without it (SFM 4.1, Table 2), and what becomes of the determinants.

A run ends as diverged where its objective is not finite or over 1,000 bits/dim.

Source: Tatsunami and Taki, "Methods for stabilizing flow-based generative models" (SFM).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.training.checkpoint import write_aside
from snf_ext.training.data import load_images

from . import report

DIVERGED = 1000.0  # bits/dim


@dataclass(frozen=True)
class Run:
    """The settings of one run."""

    experiment: str
    name: str
    batch_size: int
    lr: float
    penalty: float
    init_images: int  # that actnorm starts from
    coupling: str = "additive"
    levels: int = 4
    steps: int = 16
    width: int = 64


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


def train(settings: Run, images: Tensor, updates: int, seed: int) -> dict[str, Any]:
    """One run: bits/dim of every step, and each coupling's largest |output| after one update."""
    torch.manual_seed(seed)
    flow = snf_ext.models.glow(
        tuple(images.shape[1:]),
        settings.levels,
        settings.steps,
        settings.width,
        "lu",
        coupling=settings.coupling,
    ).train()
    start, rest = images[: settings.init_images], images[settings.init_images :]
    # In parts only for speed: the statistics are those of all images together.
    snf_ext.layers.initialize(flow, list(start.float().split(32)))
    optimizer = torch.optim.RAdam(flow.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8)
    bits: list[float] = []
    outputs: list[float] = []
    dets: list[float] = []
    began = time.perf_counter()
    for update, batch in enumerate(_batches(rest, settings.batch_size)):
        if update == updates:
            break
        optimizer.zero_grad()
        with snf_ext.layers.coupling_outputs(flow) as largest:
            loss = flow.loss(batch.float(), bits_per_dim=True)
        if update == 1:
            outputs = [value.item() for value in largest.values()]
        bits.append(loss.item())
        if not abs(bits[-1]) < DIVERGED:
            break
        squares = flow.squared_log_dets()
        dets.append(squares.item())
        loss = loss + settings.penalty * squares
        loss.backward()
        optimizer.step()
    diverged = not abs(bits[-1]) < DIVERGED
    return {
        "settings": asdict(settings),
        "diverged_at": len(bits) - 1 if diverged else None,
        "bits_per_dim": [value if math.isfinite(value) else None for value in bits],
        "largest_outputs_after_one_update": [v if math.isfinite(v) else None for v in outputs],
        "squared_log_dets": {"first": dets[0], "largest": max(dets), "last": dets[-1]},
        "seconds": time.perf_counter() - began,
    }


def _batches(images: Tensor, size: int) -> Any:
    while True:
        yield from images.split(size)


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
