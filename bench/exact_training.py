"""Trains the 9-layer model by the exact and by the self-normalizing gradient, side by side.

    python -m bench.exact_training --data-dir DIR [--steps 300] [--out F.json] [--plot F.png]

Both from the same w, biases and splines, on the same batches of 100 MNIST images with the same
dequantization noise, in turns: Adam at 1e-3, warmed up over 100 steps, lambda 1, float32. Every 50
steps the exact NLL of 2,000 validation images in nats, and the angle between the self-normalizing
and the exact gradient, averaged over layers, on 50 of these images (of the exact gradient it is 0).
Some steps by the exact gradient with dense matrices are timed too, on a copy that is thrown away:
in float32, as the layer did it before, and in float64, which is what the package computes in.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.bijection import walk
from snf_ext.training import evaluate
from snf_ext.training.angle import gradient_angle, mean_angle
from snf_ext.training.checkpoint import write_aside
from snf_ext.training.seeds import seeded

from . import report
from .cases import MODELS, ModelCase
from .exact_dense import dense_log_abs_det, swapped
from .mnist import public_start, read_images
from .models import make_flow
from .timing import machine_noise, quartiles

BATCH, RATE, WARM_UP = 100, 1e-3, 100
VALIDATION, ANGLE_IMAGES = 2000, 50
DENSE_STEPS = 3  # at each measurement, of which the first is not timed
COLUMNS = "  step      NLL    angle   seconds          NLL   seconds"
SELF_NORM, EXACT = "self-normalizing", "exact"
DENSE = {"exact, dense float32": torch.float32, "exact, dense float64": torch.float64}


class Trainee:
    """A flow, its optimizer, and the seconds of every step."""

    def __init__(self, flow: snf_ext.Flow, seed: int) -> None:
        self.flow, self.seed = flow, seed
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=RATE, fused=True)
        self.seconds: list[float] = []

    def step(self, images: Tensor, number: int) -> None:
        """Training step ``number``, from 1: its noise depends on that and the seed alone."""
        self.flow.train()
        with seeded(torch.device("cpu"), self.seed, "step", number):
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * min(1.0, number / WARM_UP)
            self.optimizer.zero_grad()
            self.flow.loss(images.float()).backward()
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - start)


def start(case: ModelCase, seed: int) -> tuple[snf_ext.Flow, snf_ext.Flow]:
    """The self-normalizing flow, and the one with exact convolutions that has the same numbers."""
    torch.manual_seed(seed)
    flow = make_flow(case)
    public_start(flow)
    exact = snf_ext.models.conv(case.event_shape, case.layers, case.blocks, conv="exact")
    learned = {name for name in flow.state_dict() if name.endswith("weight_inv")}
    shared = {k: v for k, v in flow.state_dict().items() if k not in learned}
    exact.load_state_dict(shared)
    return flow, exact


def batch(images: Tensor, number: int) -> Tensor:
    """The images of step ``number``, in the order of the file."""
    first = (number - 1) * BATCH % (len(images) - BATCH + 1)
    return images[first : first + BATCH]


def convolutions(flow: snf_ext.Flow) -> list[tuple[Any, tuple[int, int]]]:
    """The flow's convolutions, with the size of their images."""
    kinds = (snf_ext.SelfNormConv2d, snf_ext.ExactConv2d)
    return [
        (layer, (shape[1], shape[2]))
        for layer, shape in walk(list(flow.bijections), flow.event_shape)  # type: ignore[arg-type]
        if isinstance(layer, kinds)
    ]


def check_gradients(exact: snf_ext.Flow) -> float:
    """Largest relative error of a layer's log-determinant's gradient against dense, in float64.

    Raises:
        RuntimeError: it is more than 1e-9.
    """
    errors = []
    for layer, size in convolutions(copy.deepcopy(exact).double()):
        ours, dense = (
            torch.autograd.grad(
                log_abs_det(layer.weight, size, *layer.shape.geometry), layer.weight
            )
            for log_abs_det in (snf_ext.exact.conv2d_log_abs_det, dense_log_abs_det)
        )
        errors.append(((ours[0] - dense[0]).abs().max() / dense[0].abs().max()).item())
    if not max(errors) <= 1e-9:
        raise RuntimeError(f"the exact gradient differs from the dense one by {max(errors):.1e}")
    return max(errors)


def dense_log_abs_det_in(dtype: torch.dtype, weight: Tensor, *geometry: Any) -> Tensor:
    """The dense log-determinant, computed in a precision of its own."""
    return dense_log_abs_det(weight.to(dtype), *geometry).to(weight)


def time_dense(exact: snf_ext.Flow, images: Tensor, step: int, dtype: torch.dtype) -> list[float]:
    """Seconds of steps by the dense exact gradient, on a copy."""
    trainee = Trainee(copy.deepcopy(exact), seed=0)
    with swapped(log_abs_det=functools.partial(dense_log_abs_det_in, dtype)):
        for i in range(DENSE_STEPS):
            trainee.step(batch(images, step + 1 + i), step + 1 + i)
    return trainee.seconds[1:]


def run(
    case: ModelCase, training: Tensor, validation: Tensor, steps: int, every: int, seed: int
) -> dict[str, Any]:
    """Trains, prints, and returns what was measured."""
    flow, exact = start(case, seed)
    checked = check_gradients(exact)
    print(f"gradients of log-determinants against dense: within {checked:.1e} in float64")
    trainees = {SELF_NORM: Trainee(flow, seed), EXACT: Trainee(exact, seed)}
    dense: dict[str, list[float]] = {name: [] for name in DENSE}
    rows: list[dict[str, Any]] = []
    print(f"      {SELF_NORM:^27}    {EXACT:>19}\n" + COLUMNS)
    for step in range(steps + 1):
        if step:
            order = list(trainees.values())
            for trainee in order if step % 2 else order[::-1]:
                trainee.step(batch(training, step), step)
        if step % every and step < steps:
            continue
        found = [_measure(name, t, validation, step) for name, t in trainees.items()]
        for name, dtype in DENSE.items():
            dense[name] += time_dense(exact, training, step, dtype)
        rows += found
        _print(*found)
    times = [_times(name, t.seconds) for name, t in trainees.items()]
    times += [_times(name, seconds) for name, seconds in dense.items()]
    for row in times:
        row["over_self_normalizing"] = row["step_s"] / times[0]["step_s"]
        print(
            f"{row['variant']:<22}{row['step_s'] * 1e3:>9.2f} ms/step "
            f"[{row['step_q1_s'] * 1e3:.2f} {row['step_q3_s'] * 1e3:.2f}], "
            f"{row['over_self_normalizing']:.2f} times {SELF_NORM}, {row['steps']} steps"
        )
    return {"gradient_error": checked, "rows": rows, "times": times}


def _measure(name: str, trainee: Trainee, validation: Tensor, step: int) -> dict[str, Any]:
    nll = evaluate.negative_log_likelihood(trainee.flow, validation).mean().item()
    angle: float | None = 0.0
    if name == SELF_NORM:
        with seeded(torch.device("cpu"), 0, "angle"):
            angle = mean_angle(gradient_angle(trainee.flow, validation[:ANGLE_IMAGES].float()))
    seconds = sum(trainee.seconds)
    return {"step": step, "variant": name, "nll": nll, "angle_deg": angle, "seconds": seconds}


def _print(learned: Mapping[str, Any], exact: Mapping[str, Any]) -> None:
    print(
        f"{learned['step']:>6}{learned['nll']:>9.1f}{learned['angle_deg']:>8.2f}°"
        f"{learned['seconds']:>10.2f}    {exact['nll']:>9.1f}{exact['seconds']:>10.2f}",
        flush=True,
    )


def _times(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    low, middle, high = quartiles(seconds)
    return {
        "variant": name,
        "step_s": middle,
        "step_q1_s": low,
        "step_q3_s": high,
        "steps": len(seconds),
    }


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """NLL against the step and against the seconds that training took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, key, label in zip(panels, ("step", "seconds"), ("step", "seconds"), strict=True):
        for name in (SELF_NORM, EXACT):
            found = [row for row in rows if row["variant"] == name]
            axes.plot([r[key] for r in found], [r["nll"] for r in found], marker="o", label=name)
        axes.set(xlabel=label)
        axes.grid(True, alpha=0.3)
    panels[0].set(ylabel="exact validation NLL, nats", yscale="log")
    panels[0].legend(fontsize=8)
    with write_aside(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = read_images(args.data_dir)
    training, validation = images[:50_000], images[50_000:][:VALIDATION]
    if len(validation) < VALIDATION:
        print(f"MNIST's 60,000 training images are needed; got {len(images)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    noise = machine_noise()
    print(f"{noise}; {torch.get_num_threads()} threads")
    command = f"python -m bench.exact_training --steps {args.steps} --every {args.every}"
    command += f" --seed {args.seed}" + (f" --threads {args.threads}" if args.threads else "")
    environment = report.environment(command)
    case = next(c for c in MODELS if c.model == "conv")
    result = run(case, training, validation, args.steps, args.every, args.seed)
    after = machine_noise()
    print(f"afterwards, {after}")
    if args.out:
        record = {
            "suite": "exact_training",
            "environment": environment,
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(after),
        }
        report.write_json(args.out, record | result)
    if args.plot:
        draw(result["rows"], f"{case.name}; {report.headline(environment)}", args.plot)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exact_training",
        description="The exact gradient beside the self-normalizing one.",
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    for name in ("steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
