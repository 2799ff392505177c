"""Free-form networks as flows on two-dimensional densities, beside a flow of affine couplings.

    python -m bench.toy_densities --out bench/results/toy-densities-cpu.json

Three densities (moons, rings, checkerboard), and for each

- coupling: eight affine couplings, trained by the exact likelihood;
- self_norm: four residual networks, each with a learned inverse of the same shape
  (``SelfNormBijection``), trained by the self-normalizing gradient;
- exact: the same four networks trained by the exact gradient, which the learned inverses only
  follow; what the self-normalizing gradient could reach;
- free_form: the same networks as one f and one g in a row, trained the way of free-form flows
  (Draxler et al. 2024): the gradient of log |det J_f| by J_g, and g by reconstruction alone.

All have about the same number of parameters, learned inverses counted. Reported are the exact
test NLL and the integral of the density over a large square: where it is not 1, f is no bijection
there. It may still be one on the points that the learned inverse brings back to where they were
(within 0.3): then the density on these alone, that of noise sent back to them, integrates to 1 at
most. Where it is more, f folds among them, and the NLL flatters. The normalised NLL adds the
logarithm of the integral over these points; test points that are not among them are counted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snf_ext
from snf_ext import Flow, SelfNormBijection, ops
from snf_ext.jacobian import orthonormal_probes, pulled, pushed

from . import report

NEAR = 0.3  # how near the learned inverse has to come
HALF_SIDE = 8.0  # of the square that densities are integrated over
TARGET = 0.05  # nats


def moons(count: int) -> Tensor:
    """Two half circles that reach into each other, with noise of 0.1."""
    angle = math.pi * torch.rand(count)
    upper = (torch.rand(count) < 0.5).float()
    sign = 2 * upper - 1
    x = sign * angle.cos() + (1 - upper)
    y = sign * angle.sin() + 0.5 * (1 - upper)
    points = torch.stack((x - 0.5, y - 0.25), 1) + 0.1 * torch.randn(count, 2)
    return points * torch.tensor([1.15, 2.0])


def rings(count: int) -> Tensor:
    """Three circles around the origin, equally likely, with noise of 0.08 across."""
    radius = 0.6 * torch.randint(1, 4, (count,)) + 0.08 * torch.randn(count)
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


def checkerboard(count: int) -> Tensor:
    """Uniform on the eight dark fields of a board of four by four, of side 4."""
    column = torch.randint(0, 4, (count,))
    row = 2 * torch.randint(0, 2, (count,)) + column % 2
    return torch.stack((column, row), 1) + torch.rand(count, 2) - 2


DENSITIES: dict[str, Callable[[int], Tensor]] = {
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
}


class Residual(nn.Module):
    """``x + m(x)``, m a network of two hidden layers that starts at nearly zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        with torch.no_grad():
            self.change[-1].weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def coupling(args: argparse.Namespace) -> Flow:
    layers = [
        snf_ext.AffineCoupling(2, args.width, mask="vector", flipped=bool(i % 2))
        for i in range(2 * args.blocks)
    ]
    return Flow(layers, (2,))


def self_norm(args: argparse.Namespace) -> Flow:
    return Flow(
        [
            SelfNormBijection(
                Residual(args.width), Residual(args.width), (2,), args.probes, args.jvp_weight
            )
            for _ in range(args.blocks)
        ],
        (2,),
        recon_weight=args.recon_weight,
    )


def free_form(args: argparse.Namespace) -> Flow:
    f, g = (nn.Sequential(*(Residual(args.width) for _ in range(args.blocks))) for _ in "fg")
    return Flow([SelfNormBijection(f, g, (2,), args.probes)], (2,), args.recon_weight)


def exact_loss(flow: Flow, x: Tensor) -> Tensor:
    """The exact NLL, and the reconstruction error for the learned inverses alone."""
    recon = torch.zeros(())
    h = x
    for layer in flow.bijections:
        fixed = h.detach()
        if isinstance(layer, SelfNormBijection):
            with torch.no_grad():
                z = layer.f(fixed)
            recon = recon + (layer.g(z) - fixed).square().sum(1).mean()
            h = layer.f(h)
    return recon - flow.log_prob(x).mean()


def free_form_loss(flow: Flow, x: Tensor) -> Tensor:
    """``-log p_Z(f(x)) - [J_g'v]' J_f v + recon_weight ||g(f(x)) - x||^2``, [.] held fixed."""
    (layer,) = flow.bijections
    v = orthonormal_probes(x, layer.probes)
    z, there = pushed(layer.f, x, v)
    _, back = pulled(layer.g, z.detach(), v)
    log_det = (back.detach() * there).sum(2).mean(0)
    recon = (layer.g(z) - x).square().sum(1)
    return (flow.recon_weight * recon - ops.normal_log_prob(z) - log_det).mean()


Make = Callable[[argparse.Namespace], Flow]
MODELS: dict[str, tuple[Make, Callable[[Flow, Tensor], Tensor]]] = {
    "coupling": (coupling, Flow.loss),
    "self_norm": (self_norm, Flow.loss),
    "exact": (self_norm, exact_loss),
    "free_form": (free_form, free_form_loss),
}


def train(model: str, density: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model on one density: its exact NLL, integral, and reconstruction error."""
    torch.manual_seed(args.seed)
    draw = DENSITIES[density]
    test = draw(args.test)
    make, loss = MODELS[model]
    flow = make(args).train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    began = time.perf_counter()
    for step in range(args.steps):
        optimizer.zero_grad()
        value = loss(flow, draw(args.batch))
        value.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        if args.verbose and (step + 1) % (args.steps // 5) == 0:
            nll = -flow.log_prob(test[:2000]).mean().item()
            print(f"  {density} {model} {step + 1}: {nll:.3f}", flush=True)
    seconds = time.perf_counter() - began
    flow.eval()
    with torch.no_grad():
        nll = -flow.log_prob(test).mean().item()
        recon = flow(test).recon.mean().item()
        back = (flow.inverse(flow(test).z) - test).square().sum(1)
    mass, mass_near = integral(flow, args.grid)
    inverses = [layer.g for layer in flow.bijections if isinstance(layer, SelfNormBijection)]
    return {
        "density": density,
        "model": model,
        "nll": nll,
        "integral": mass,
        "integral_brought_back": mass_near,
        "test_points_not_brought_back": int((back > NEAR**2).sum()),
        "normalised_nll": nll + math.log(mass_near),
        "recon": recon,
        "recon_end_to_end": back.mean().item(),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "of_learned_inverses": sum(p.numel() for g in inverses for p in g.parameters()),
        "ms_per_step": 1e3 * seconds / args.steps,
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
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    result: dict[str, Any] = {
        "suite": "toy_densities",
        "environment": report.environment(f"python -m bench.toy_densities {given}".strip()),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "runs": [],
    }
    for density in args.densities:
        base: dict[str, Any] | None = None
        for model in args.models:
            run = train(model, density, args)
            result["runs"].append(run)
            base = run if model == "coupling" else base
            _print(run, base)
            if args.out:
                report.write_json(args.out, result)
    return 0


def _print(run: dict[str, Any], base: dict[str, Any] | None) -> None:
    against = ""
    if base is not None and run is not base:
        gap = run["normalised_nll"] - base["normalised_nll"]
        against = f"; {gap:+.3f} to coupling"
        against += f" ({'within' if gap <= TARGET else 'not within'} {TARGET:g})"
    print(
        f"{run['density']}, {run['model']}: NLL {run['nll']:.3f}, integral {run['integral']:.4f}, "
        f"brought back {run['integral_brought_back']:.4f} "
        f"({run['test_points_not_brought_back']} test points not), "
        f"normalised {run['normalised_nll']:.3f} nats{against}; recon {run['recon']:.2g}, end to "
        f"end {run['recon_end_to_end']:.2g}; {run['parameters']} parameters "
        f"({run['of_learned_inverses']} of g), {run['ms_per_step']:.1f} ms/step",
        flush=True,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.toy_densities", description="Free-form networks on toy densities."
    )
    parser.add_argument("--densities", nargs="+", choices=list(DENSITIES), default=list(DENSITIES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--probes", type=int, default=1, help="1, or 2 for exact traces")
    parser.add_argument("--recon-weight", type=float, default=3.0)
    parser.add_argument("--jvp-weight", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--clip", type=float, default=10.0, help="largest norm of a gradient")
    parser.add_argument("--test", type=int, default=20000, help="test samples")
    parser.add_argument("--grid", type=int, default=500, help="points along each axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="exact NLL on the way")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
