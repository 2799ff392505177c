"""Free-form networks as flows on small tables, beside a flow of affine couplings.

    python -m bench.tabular --jobs 2 --out bench/results/tabular-cpu.json

Two data sets that scikit-learn carries (breast_cancer, 569 rows of 30; diabetes, 442 rows of 10),
and for each the four models of :mod:`bench.general_models`. Columns are standardised by the
training rows, and Gaussian noise of 0.1 is added (drawn anew for each batch, once for the rest):
values are rounded, some columns have two values only, and a density on atoms has no largest
likelihood. 60 % of the rows train, 20 % stop (the weights of the best exact validation NLL, after
``patience`` measurements without a better one), 20 % test; split and start by the seed.

Reported is the exact test NLL, by the whole Jacobian of every test row. Whether f is one to one
cannot be integrated here; how far the learned inverse leads from where it started is printed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snf_ext import Flow

from .general_models import (
    MODELS,
    Record,
    add_arguments,
    count,
    measured,
    of_learned_inverses,
    spread,
)

SETS = ("breast_cancer", "diabetes")
NOISE = 0.1  # standard deviations of a column


def read(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows without noise, validation and test rows with it; standardised."""
    from sklearn import datasets

    rows = torch.from_numpy(getattr(datasets, f"load_{name}")().data).double()
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    train, val, test = rows.tensor_split([len(rows) * 6 // 10, len(rows) * 8 // 10])
    mean, deviation = train.mean(0), train.std(0)
    train, val, test = (((part - mean) / deviation).float() for part in (train, val, test))
    return (
        train,
        val + NOISE * torch.randn(val.shape, generator=generator),
        test + NOISE * torch.randn(test.shape, generator=generator),
    )


def train(name: str, model: str, seed: int, args: argparse.Namespace) -> Record:
    """One model on one data set: its exact test NLL where validation was best."""
    rows, val, test = read(name, seed)
    torch.manual_seed(seed)
    make, loss = MODELS[model]
    flow = make(rows.shape[1], args).train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    best, best_step, best_state = exact_nll(flow, val), 0, copy.deepcopy(flow.state_dict())
    seconds, step = 0.0, 0
    while step < args.steps and step - best_step < args.patience * args.every:
        began = time.process_time()
        for _ in range(args.every):
            batch = rows[torch.randint(len(rows), (args.batch,))]
            optimizer.zero_grad()
            loss(flow, batch + NOISE * torch.randn_like(batch)).backward()
            nn.utils.clip_grad_norm_(flow.parameters(), args.clip)
            optimizer.step()
        step += args.every
        seconds += time.process_time() - began
        if (nll := exact_nll(flow, val)) < best:
            best, best_step, best_state = nll, step, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(best_state)
    flow.eval()
    with torch.no_grad():
        back = (flow.inverse(flow(test).z) - test).square().sum(1)
    return {
        "data": name,
        "model": model,
        "seed": seed,
        "dimension": rows.shape[1],
        "nll": exact_nll(flow, test),
        "validation_nll": best,
        "best_step": best_step,
        "steps": step,
        "recon_end_to_end": back.mean().item(),
        "recon_largest": back.max().item(),
        "parameters": count(flow),
        "of_learned_inverses": of_learned_inverses(flow),
        "cpu_ms_per_step": 1e3 * seconds / step,
    }


@torch.no_grad()
def exact_nll(flow: Flow, rows: Tensor) -> float:
    return -flow.log_prob(rows).mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    print(table(measured("tabular", arguments, args, train, args.data, line)))
    return 0


def line(run: Record) -> str:
    return (
        f"{run['data']}, {run['model']}, seed {run['seed']}: test NLL {run['nll']:.3f} nats, "
        f"best at step {run['best_step']} of {run['steps']}; end to end "
        f"{run['recon_end_to_end']:.2g}, largest {run['recon_largest']:.2g}; "
        f"{run['parameters']} parameters, {run['cpu_ms_per_step']:.1f} ms/step"
    )


def table(result: Mapping[str, Any]) -> str:
    """Means and deviations over the seeds."""
    lines = [
        "| data | model | exact test NLL, nats | best step | reconstruction | parameters (of g) | "
        "CPU ms/step |",
        "|" + 7 * "---|",
    ]
    for data in result["settings"]["data"]:
        for model in result["settings"]["models"]:
            runs = [r for r in result["runs"] if (r["data"], r["model"]) == (data, model)]
            if runs:
                lines.append(
                    f"| {data} | {model} | {spread(runs, 'nll', 2)} "
                    f"| {spread(runs, 'best_step', 0)} | {spread(runs, 'recon_end_to_end', 3)} "
                    f"| {runs[0]['parameters']} ({runs[0]['of_learned_inverses']}) "
                    f"| {spread(runs, 'cpu_ms_per_step', 1)} |"
                )
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tabular", description="Free-form networks on small tables."
    )
    add_arguments(parser)
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--steps", type=int, default=1000, help="the most that are taken")
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    parser.add_argument("--patience", type=int, default=6, help="measurements")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--recon-weight", type=float, default=3.0)
    parser.add_argument("--jvp-weight", type=float, default=0.3)
    parser.add_argument("--sharpness", type=float, default=1.0, help="of features at the start")
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
