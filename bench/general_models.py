"""Free-form networks trained as flows in several ways, and affine couplings of the same size.

- coupling: affine couplings, trained by the exact likelihood;
- self_norm: residual networks, each with a learned inverse of the same shape
  (``SelfNormBijection``), trained by the self-normalizing gradient;
- exact: the same networks under the same reconstruction penalty, trained by the exact gradient;
- free_form: the same networks as one f and one g in a row, trained the way of free-form flows
  (Draxler et al. 2024): the gradient of log |det J_f| by J_g, and g by reconstruction alone.

All have about the same number of parameters, learned inverses counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snf_ext
from snf_ext import Flow, SelfNormBijection, ops
from snf_ext.bijection import push
from snf_ext.jacobian import orthonormal_probes, pulled, pushed

from . import report
from .timing import machine_noise

Record = dict[str, Any]


class Residual(nn.Module):
    """``x + m(x)``, m a network of two hidden layers that starts at nearly zero.

    ``sharpness`` multiplies the first layer at the start: larger, and m starts with features that
    change over shorter distances.
    """

    def __init__(self, size: int, width: int, sharpness: float) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Linear(size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        with torch.no_grad():
            self.change[-1].weight.mul_(0.1)
            for p in self.change[0].parameters():
                p.mul_(sharpness)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def self_norm(size: int, args: argparse.Namespace) -> Flow:
    def network() -> Residual:
        return Residual(size, args.width, args.sharpness)

    layers = [
        SelfNormBijection(network(), network(), (size,), args.probes, args.jvp_weight)
        for _ in range(args.blocks)
    ]
    return Flow(layers, (size,), recon_weight=args.recon_weight)


def free_form(size: int, args: argparse.Namespace) -> Flow:
    f, g = (
        nn.Sequential(*(Residual(size, args.width, args.sharpness) for _ in range(args.blocks)))
        for _ in "fg"
    )
    return Flow([SelfNormBijection(f, g, (size,), args.probes)], (size,), args.recon_weight)


def coupling(size: int, args: argparse.Namespace) -> Flow:
    """Two couplings for each residual network, of the width that comes nearest in parameters."""
    with torch.random.fork_rng():
        aim = count(self_norm(size, args)) / (2 * args.blocks)
        width = min(
            range(1, 3 * args.width + 3),
            key=lambda w: abs(count(snf_ext.AffineCoupling(size, w, mask="vector")) - aim),
        )
    layers = [
        snf_ext.AffineCoupling(size, width, mask="vector", flipped=bool(i % 2))
        for i in range(2 * args.blocks)
    ]
    return Flow(layers, (size,))


def exact_loss(flow: Flow, x: Tensor) -> Tensor:
    """The exact NLL and the reconstruction penalty."""
    z, log_det, recon = push(list(flow.bijections), x, None, exact=True)  # type: ignore[arg-type]
    return (flow.recon_weight * recon - ops.normal_log_prob(z) - log_det).mean()


def free_form_loss(flow: Flow, x: Tensor) -> Tensor:
    """``-log p_Z(f(x)) - [J_g'v]' J_f v + recon_weight ||g(f(x)) - x||^2``, [.] held fixed."""
    (layer,) = flow.bijections
    v = orthonormal_probes(x, layer.probes)
    z, there = pushed(layer.f, x, v)
    _, back = pulled(layer.g, z.detach(), v)
    log_det = (back.detach() * there).sum(2).mean(0)
    recon = (layer.g(z) - x).square().sum(1)
    return (flow.recon_weight * recon - ops.normal_log_prob(z) - log_det).mean()


Make = Callable[[int, argparse.Namespace], Flow]
MODELS: dict[str, tuple[Make, Callable[[Flow, Tensor], Tensor]]] = {
    "coupling": (coupling, Flow.loss),
    "self_norm": (self_norm, Flow.loss),
    "exact": (self_norm, exact_loss),
    "free_form": (free_form, free_form_loss),
}


def count(module: nn.Module) -> int:
    """Parameters, those of learned inverses included."""
    return sum(p.numel() for p in module.parameters())


def of_learned_inverses(flow: Flow) -> int:
    return sum(count(layer.g) for layer in flow.bijections if isinstance(layer, SelfNormBijection))


def measured(
    suite: str,
    arguments: Sequence[str] | None,
    args: argparse.Namespace,
    run: Callable[..., Record],
    data: Sequence[str],
    line: Callable[[Record], str],
) -> Record:
    """``run(data, model, seed, args)`` of each data set, model and seed.

    Each is printed as ``line`` and written to ``args.out`` when it is done.
    """
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    result: Record = {
        "suite": suite,
        "environment": report.environment(f"python -m bench.{suite} {given}".strip()),
        "noise": report.noise_record(machine_noise()),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "runs": [],
    }
    cases = [(d, m, s, args) for s in args.seeds for m in args.models for d in data]
    for row in _finished(run, cases, args.jobs):
        result["runs"].append(row)
        print(line(row), flush=True)
        if args.out:
            report.write_json(args.out, result)
    return result


def _finished(
    run: Callable[..., Record], cases: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[Record]:
    """``run(*case)`` of each case as it is done, by ``jobs`` processes of one thread."""
    if jobs == 1:
        yield from (run(*case) for case in cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(run, *case) for case in cases]):
            yield future.result()


def spread(runs: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    """Mean and standard deviation over seeds, to print."""
    values = [run[key] for run in runs]
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all of these benchmarks can be told."""
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--clip", type=float, default=10.0, help="largest norm of a gradient")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
