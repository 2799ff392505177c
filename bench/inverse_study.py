"""How the learned inverse is kept, and what that costs in likelihood: training runs side by side.

    python -m bench.inverse_study STUDY MODEL --data-dir DIR --out FILE [--seeds 3] [--only METHOD]

Studies: ``kept`` (exact gradient, the penalty on both weights, on the inverse alone, tracked, and
tracked with a debiased gradient), ``debias`` (plain and debiased over lambda), ``asymmetric`` (3x3
and 5x5 inverses of 3x3 layers). Models: ``fc``, ``conv`` (SNF A.3) and ``glow`` (2 levels of 4
steps, width 16). All from the same start on the same batches of 100 MNIST images with the same
dequantization noise, by seed: Adam at the paper's rate, warmed up over 10 epochs of 500 steps,
float32.

Every 500 steps a row gets the exact NLL of the last 10,000 training images in nats, and of each
layer the relative reconstruction error and the norm of I - W R; at the end how far samples come
back by the learned, the refined and the exact inverse, and the gradient angle. Each row is written
to FILE when it is done; rows that FILE has are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.bijection import pull, push
from snf_ext.reference.convolution import flip
from snf_ext.training import evaluate
from snf_ext.training.angle import gradient_angle, mean_angle
from snf_ext.training.seeds import seeded

from . import report
from .mnist import read_images

BATCH, WARM_UP, EPOCH = 100, 5000, 500
SAMPLES, ANGLE_IMAGES, ANGLE_STEPS = 200, 50, 100
SHOWN = 8  # points of a table
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Model:
    """One of the paper's models: how to make it, its learning rate, and its lambda."""

    make: Callable[..., snf_ext.Flow]
    layer: str
    rate: float
    recon_weight: float
    settings: Mapping[str, Any] = field(default_factory=dict)


GLOW = {"levels": 2, "steps": 4, "width": 16}
MODELS = {
    "fc": Model(snf_ext.models.fc, "linear", 1e-4, 1.0),
    "conv": Model(snf_ext.models.conv, "conv", 1e-3, 1.0),
    "glow": Model(snf_ext.models.glow, "mixing", 1e-3, 100.0, GLOW),
}

# Of each study: the settings of each method, on top of the model's, and how many steps.
KEPT: dict[str, dict[str, Any]] = {
    "exact": {"layer": "exact"},
    "penalty": {},
    "inverse-only": {"inverse": "inverse-only"},
    "tracked": {"inverse": "tracked"},
    "tracked, debiased": {"inverse": "tracked", "debias": snf_ext.Debias(2, 4)},
}
DEBIAS: dict[str, dict[str, Any]] = {"exact": {"layer": "exact"}}
for _weight in (0.1, 1.0, 10.0, 100.0, 1000.0):
    DEBIAS[f"plain, lambda {_weight:g}"] = {"recon_weight": _weight}
    DEBIAS[f"debiased, lambda {_weight:g}"] = {
        "recon_weight": _weight,
        "debias": snf_ext.Debias(2, 4),
    }
ASYMMETRIC: dict[str, dict[str, Any]] = {
    f"{size}x{size}, {kept}": {"inverse_kernel_size": size, "inverse": kept}
    for kept in ("penalty", "tracked")
    for size in (3, 5, 7)
}
STUDIES: dict[str, tuple[dict[str, dict[str, Any]], Mapping[str, int]]] = {
    "kept": (KEPT, {"fc": 15_000, "conv": 2500, "glow": 2500}),
    "debias": (DEBIAS, {"fc": 3000, "conv": 3000}),
    "asymmetric": (ASYMMETRIC, {"conv": 1500}),
}


def build(model: Model, settings: Mapping[str, Any], seed: int) -> snf_ext.Flow:
    """The flow of a method; all methods of a seed start at the same numbers."""
    own = dict(settings)
    kind = own.pop("layer", "self_norm")
    own = {"recon_weight": model.recon_weight, **model.settings, **own, model.layer: kind}
    with seeded(CPU, seed, "start"):
        return model.make(**own)


def batches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches without end, in a new order each epoch."""
    epoch = 0
    while True:
        epoch += 1
        with seeded(CPU, seed, "order", epoch):
            order = torch.randperm(len(images))
        yield from (images[part].float() for part in order.split(BATCH))


def run(
    model: Model,
    settings: Mapping[str, Any],
    training: Tensor,
    validation: Tensor,
    steps: int,
    every: int,
    seed: int,
    show: str,
) -> dict[str, Any]:
    """One row: trains, and returns what was measured."""
    flow = build(model, settings, seed)
    stream = batches(training, seed)
    with seeded(CPU, seed, "initialize"):
        snf_ext.layers.initialize(flow, [next(stream)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=model.rate, fused=True)
    points: list[dict[str, Any]] = []
    angles: list[float] = []
    seconds = 0.0
    for step, batch in zip(range(1, steps + 1), stream, strict=False):
        flow.train()
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = model.rate * min(1.0, step / WARM_UP)
        optimizer.zero_grad()
        with seeded(CPU, seed, "step", step):
            loss = flow.loss(batch)
            loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if not math.isfinite(loss.item()):
            points.append({"step": step, "nll": None})
            break
        if steps - step < ANGLE_STEPS and step % 10 == 0:
            angle = angle_of(flow, validation)
            angles += [] if angle is None else [angle]
        if step % every == 0 or step == steps:
            points.append({"step": step, **measure(flow, validation)})
            print(f"{show}: {points[-1]}", flush=True)
    finite = points[-1]["nll"] is not None
    return {
        "points": points,
        "step_s": seconds / step,
        "angle_deg": sum(angles) / len(angles) if angles else None,
        "samples": samples(flow, validation[:SAMPLES]) if finite else None,
    }


def angle_of(flow: snf_ext.Flow, images: Tensor) -> float | None:
    """The gradient angle in degrees, averaged over layers; None without learned inverses."""
    with seeded(CPU, 0, "angle"):
        return mean_angle(gradient_angle(flow, images[:ANGLE_IMAGES].float()))


def measure(flow: snf_ext.Flow, images: Tensor) -> dict[str, Any]:
    """Exact NLL, and of each learned inverse the relative error and the norm of I - W R."""
    nll = evaluate.negative_log_likelihood(flow, images).mean().item()
    sizes: dict[str, tuple[float, float, float]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, step, name=name: sizes.update({name: seen(layer, args[0], step)})
        )
        for name, layer in learned(flow).items()
    ]
    flow.eval()
    with torch.no_grad(), seeded(CPU, 0, "measure"):
        flow(images[:500].float())
    for hook in hooks:
        hook.remove()
    return {
        "nll": nll if math.isfinite(nll) else None,
        "relative_error": {name: value[0] for name, value in sizes.items()},
        "norm": {name: value[1] for name, value in sizes.items()},
        "radius": {name: value[2] for name, value in sizes.items()},
    }


def learned(flow: snf_ext.Flow) -> dict[str, Any]:
    kinds = (snf_ext.SelfNormLinear, snf_ext.SelfNormConv2d)
    return {name: layer for name, layer in flow.named_modules() if isinstance(layer, kinds)}


def seen(layer: Any, x: Tensor, step: snf_ext.FlowStep) -> tuple[float, float, float]:
    """Relative reconstruction error, and norm and spectral radius of I - W R by its powers."""
    w, r = layer.weight, layer.weight_inv
    groups = layer.shape.groups if isinstance(layer, snf_ext.SelfNormConv2d) else None
    w_t, r_t = (w.T, r.T) if groups is None else (flip(w, groups), flip(r, groups))
    v = u = torch.randn_like(x[:4])
    norm = radius = 0.0
    for _ in range(30):  # the mean growth of the last steps tells the largest in size
        v = v / v.norm()
        v = v - layer._map(w, layer._map(r, v))
        norm = v.norm().item()
        v = v - layer._map(r_t, layer._map(w_t, v))
        after = u - layer._map(w, layer._map(r, u))
        radius = (after.norm() / u.norm()).item()
        u = after / after.norm().clamp(min=1e-30)
    return step.recon.sum().item() / x.square().sum().item(), norm, radius


@torch.no_grad()
def samples(flow: snf_ext.Flow, images: Tensor) -> dict[str, float]:
    """Relative error of images that go to noise and come back by each kind of inverse."""
    flow.eval()
    before, rest = evaluate.split_preprocessing(flow)
    with seeded(CPU, 0, "samples"):
        u = push(before, images.float(), None, exact=False).z
    z = push(rest, u, None, exact=False).z
    ways: dict[str, dict[str, Any]] = {
        "learned": {"exact": False},
        "refined": {"exact": False, "refine": 50},
        "exact": {"exact": True},
    }
    return {
        name: ((pull(rest, z, None, **how) - u).norm() / u.norm()).item()
        for name, how in ways.items()
    }


def key_of(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["method"], row["seed"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = read_images(args.data_dir)
    training, validation = images[:50_000], images[50_000:60_000]
    if len(validation) < args.validation:
        print(f"MNIST's 60,000 training images are needed; got {len(images)}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    methods, lengths = STUDIES[args.study]
    steps = args.steps or lengths[args.model]
    if args.only:
        methods = {name: methods[name] for name in args.only}
    model = MODELS[args.model]
    command = f"python -m bench.inverse_study {args.study} {args.model} --steps {steps}"
    record: dict[str, Any] = {"suite": "inverse_study", "rows": []}
    if args.out.exists():
        record = json.loads(args.out.read_text())
        if record.get("steps") != steps:
            print(
                f"{args.out} must be of {steps} steps; got {record.get('steps')}", file=sys.stderr
            )
            return 2
    record |= {"study": args.study, "model": args.model, "steps": steps}
    done = {key_of(row) for row in record["rows"]}
    for seed in range(args.seeds):
        for name, settings in methods.items():
            if (name, seed) in done:
                continue
            show = f"{args.study} {args.model} {name}, seed {seed}"
            found = run(
                model,
                settings,
                training,
                validation[: args.validation],
                steps,
                args.every,
                seed,
                show,
            )
            row = {"method": name, "seed": seed, **found}
            row["environment"] = report.environment(command)
            record["rows"].append(row)
            report.write_json(args.out, record)
    print(table(record))
    return 0


def table(record: Mapping[str, Any]) -> str:
    """A line a method: means over seeds, and the worst of them.

    The NLL after so many steps; how far it is at most from the exact gradient's run of the same
    seed, at any measurement; the gradient angle, mean over layers and the last 100 steps; the
    largest relative reconstruction error of a layer; and that of images that went to noise and come
    back by each inverse.
    """
    seeds: dict[str, dict[int, dict[str, Any]]] = {}
    for row in record["rows"]:
        seeds.setdefault(row["method"], {})[row["seed"]] = row
    longest = max((row["points"] for row in record["rows"]), key=len)
    steps = [point["step"] for point in longest]
    shown = steps if len(steps) <= SHOWN else [steps[int(i)] for i in _spread(len(steps))]
    head = ["method", "seeds", *(f"{step}" for step in shown), "most off exact", "angle", "error"]
    ways = ("learned", "refined", "exact")
    lines = [
        "| " + " | ".join([*head, *ways]) + " |",
        "|" + (len(head) + len(ways)) * "---|",
    ]
    exact = seeds.get("exact", {})
    for name, rows in seeds.items():
        nll = [_mean([_at(row, step) for row in rows.values()], 1) for step in shown]
        off = [_furthest(row, exact[seed]) for seed, row in rows.items() if seed in exact]
        last = [row["points"][-1] for row in rows.values()]
        worst = [max(p["relative_error"].values()) for p in last if p.get("relative_error")]
        back = [row["samples"] for row in rows.values() if row["samples"]]
        cells = [name, str(len(rows)), *nll]
        cells.append(f"{max(off):.3%}" if off and name != "exact" else "")
        angles = [row["angle_deg"] for row in rows.values() if row["angle_deg"] is not None]
        cells.append(f"{sum(angles) / len(angles):.2g}°" if angles else "")
        cells.append(f"{max(worst):.2g}" if worst else "")
        for way in ways:
            found = max((b[way] for b in back), default=math.nan)
            cells.append(f"{found:.2g}" if worst or way == "exact" else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(count: int) -> list[float]:
    """Which of ``count`` points a table has room for: closer together where training is young."""
    return [round((count - 1) * (i / (SHOWN - 1)) ** 1.5) for i in range(SHOWN)]


def _at(row: Mapping[str, Any], step: int) -> float | None:
    return next((p["nll"] for p in row["points"] if p["step"] == step), None)


def _mean(values: Sequence[float | None], digits: int) -> str:
    finite = [value for value in values if value is not None]
    return f"{sum(finite) / len(finite):.{digits}f}" if len(finite) == len(values) else "-"


def _furthest(row: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """The largest relative distance of the NLL from the exact gradient's at any point."""
    pairs = [(p["nll"], _at(exact, p["step"])) for p in row["points"]]
    return max(
        abs(nll - other) / other if nll is not None and other else math.inf for nll, other in pairs
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.inverse_study", description="Ways to keep a learned inverse."
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run (default: the study's)")
    parser.add_argument("--every", type=int, default=EPOCH, help="steps between measurements")
    parser.add_argument("--validation", type=int, default=10_000, help="images to measure on")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods to run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    methods, lengths = STUDIES[args.study]
    if args.model not in lengths:
        parser.error(f"{args.study} is for {', '.join(lengths)}; got {args.model}")
    for name in args.only or []:
        if name not in methods:
            parser.error(f"--only takes {', '.join(methods)}; got {name}")
    for name in ("seeds", "every", "validation", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
