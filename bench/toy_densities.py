"""Free-form networks as flows on two-dimensional densities, beside a flow of affine couplings.

    python -m bench.toy_densities --jobs 2 --out bench/results/toy-densities-cpu.json

Three densities (moons, rings, checkerboard), and for each the four models of
:mod:`bench.general_models`.

Reported are the exact test NLL and the integral of the density over a large square: where it is not
1, f is no bijection there, and the NLL flatters. The normalised NLL adds the logarithm of the
integral: that of a true density, whatever f is. Printed too is the integral over the points that
the learned inverse brings back to where they were (within 0.3), and how many test points it does
not bring back.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from snf_ext import Flow
from snf_ext.training.toy import DENSITIES

from .general_models import (
    MODELS,
    Record,
    add_arguments,
    count,
    measured,
    of_learned_inverses,
    spread,
)

NEAR = 0.3  # how near the learned inverse has to come
HALF_SIDE = 8.0  # of the square that densities are integrated over
TARGET = 0.05  # nats
SIZE = 2


def train(density: str, model: str, seed: int, args: argparse.Namespace) -> Record:
    """One model on one density: its exact NLL, integral, and reconstruction error."""
    torch.manual_seed(seed)
    draw = DENSITIES[density]
    test = draw(args.test)
    make, loss = MODELS[model]
    flow = make(SIZE, args).train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    began = time.process_time()
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss(flow, draw(args.batch)).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), args.clip)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    flow.eval()
    with torch.no_grad():
        nll = -flow.log_prob(test).mean().item()
        recon = flow(test).recon.mean().item()
        back = (flow.inverse(flow(test).z) - test).square().sum(1)
    mass, mass_near = integral(flow, args.grid)
    return {
        "density": density,
        "model": model,
        "seed": seed,
        "nll": nll,
        "integral": mass,
        "integral_brought_back": mass_near,
        "test_points_not_brought_back": int((back > NEAR**2).sum()),
        "normalised_nll": nll + math.log(mass),
        "recon": recon,
        "recon_end_to_end": back.mean().item(),
        "parameters": count(flow),
        "of_learned_inverses": of_learned_inverses(flow),
        "cpu_ms_per_step": 1e3 * seconds / args.steps,
    }


@torch.no_grad()
def integral(flow: Flow, points: int) -> tuple[float, float]:
    """Of the density over the square ``[-8, 8]^2``, by ``points^2`` midpoints.

    Over all points, and over those that the learned inverse brings back.
    """
    side = 2 * HALF_SIDE / points
    axis = -HALF_SIDE + side * (torch.arange(points) + 0.5)
    parts = torch.cartesian_prod(axis, axis).split(1 << 16)
    whole = near = 0.0
    for part in parts:
        density = side**2 * flow.log_prob(part).double().exp()
        back = (flow.inverse(flow(part).z) - part).square().sum(1) <= NEAR**2
        whole, near = whole + density.sum().item(), near + density[back].sum().item()
    return whole, near


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    print(table(measured("toy_densities", arguments, args, train, args.densities, line)))
    return 0


def table(result: Mapping[str, Any]) -> str:
    """Means and deviations over the seeds, and how far each model is from the couplings."""
    lines = [
        "| density | model | exact NLL, nats | integral | normalised, to coupling "
        "| reconstruction | parameters (of g) | CPU ms/step |",
        "|" + 8 * "---|",
    ]
    for density in result["settings"]["densities"]:
        base: float | None = None
        for model in result["settings"]["models"]:
            runs = [r for r in result["runs"] if (r["density"], r["model"]) == (density, model)]
            if not runs:
                continue
            mean = sum(r["normalised_nll"] for r in runs) / len(runs)
            base = mean if model == "coupling" else base
            lines.append(
                f"| {density} | {model} | {spread(runs, 'nll', 3)} | {spread(runs, 'integral', 3)} "
                f"| {_against(mean, base)} | {spread(runs, 'recon_end_to_end', 4)} "
                f"| {runs[0]['parameters']} ({runs[0]['of_learned_inverses']}) "
                f"| {spread(runs, 'cpu_ms_per_step', 1)} |"
            )
    return "\n".join(lines)


def _against(nll: float, base: float | None) -> str:
    if base is None or nll == base:
        return ""
    return f"{nll - base:+.3f} ({'within' if nll - base <= TARGET else 'not within'} {TARGET:g})"


def line(run: Record) -> str:
    return (
        f"{run['density']}, {run['model']}, seed {run['seed']}: NLL {run['nll']:.3f}, "
        f"integral {run['integral']:.4f}, brought back {run['integral_brought_back']:.4f} "
        f"({run['test_points_not_brought_back']} test points not), "
        f"normalised {run['normalised_nll']:.3f} nats; recon {run['recon']:.2g}, end to "
        f"end {run['recon_end_to_end']:.2g}; {run['parameters']} parameters "
        f"({run['of_learned_inverses']} of g), {run['cpu_ms_per_step']:.1f} ms/step"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.toy_densities", description="Free-form networks on toy densities."
    )
    add_arguments(parser)
    parser.add_argument("--densities", nargs="+", choices=list(DENSITIES), default=list(DENSITIES))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--probes", type=int, default=1, help="1, or 2 for exact traces")
    parser.add_argument("--recon-weight", type=float, default=3.0)
    parser.add_argument("--jvp-weight", type=float, default=0.1)
    parser.add_argument("--sharpness", type=float, default=4.0, help="of features at the start")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--test", type=int, default=20000, help="test samples")
    parser.add_argument("--grid", type=int, default=400, help="points along each axis")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
