"""Exact likelihood and exact samples of the 9-layer model: the package against dense matrices.

    python -m bench.exact_flow --data-dir DIR [--images 10000] [--out FILE.json]

The model is trained on MNIST by its self-normalizing gradient for 100 steps first, so that weights
are not at their start. Every timed call finds weights that nothing is kept of. Three tables:

- exact NLL of the last 10,000 training images, in batches of 500: with the package; with dense LUs
  in float64, once a weight; in float32 once a batch, as the public code does;
- what of that are determinants; "all else" is the same pass without any;
- 100 exact samples: with the package; by dense inverses and products, in float64 and in float32 as
  the public code does; by dense LUs. "all else" solves nothing, "package, kept" nothing anew.

What they compute is compared before they are timed. Models are float32; the package and dense LUs
compute in float64 inside.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext import exact
from snf_ext.bijection import pull
from snf_ext.training import evaluate
from snf_ext.training.seeds import seeded

from . import report
from .cases import MODELS, ModelCase
from .exact_dense import DenseInverse, Determinant, Nothing, dense_lu, swapped
from .exact_training import Trainee, batch, convolutions, start
from .mnist import read_images
from .timing import Variant, interleave, machine_noise

STEPS, SAMPLES = 100, 100
NLL_TARGET, SAMPLE_TARGET = 5.0, 10.0
Context = Callable[[], contextlib.AbstractContextManager[object]]

PACKAGE, ELSE, KEPT = "package", "all else", "package, kept"
NLL: Mapping[str, Context] = {
    PACKAGE: contextlib.nullcontext,
    "dense, once a weight": lambda: swapped(dense_lu),
    "dense float32, once a batch": lambda: swapped(Determinant, cached=False),
    ELSE: lambda: swapped(Nothing),
}
SAMPLE: Mapping[str, Context] = {
    PACKAGE: contextlib.nullcontext,
    "dense inverse": lambda: swapped(functools.partial(DenseInverse, dtype=torch.float64)),
    "dense inverse float32": lambda: swapped(functools.partial(DenseInverse, dtype=torch.float32)),
    "dense LU": lambda: swapped(dense_lu),
    ELSE: lambda: swapped(Nothing),
}


def trained(case: ModelCase, images: Tensor, steps: int = STEPS, seed: int = 0) -> snf_ext.Flow:
    """The flow after a short self-normalizing training."""
    flow, _ = start(case, seed)
    trainee = Trainee(flow, seed)
    for number in range(1, steps + 1):
        trainee.step(batch(images, number), number)
    return flow.eval()


def forget(flow: snf_ext.Flow) -> None:
    """Empties the layers' caches, as a change of every weight does."""
    for layer in flow.modules():
        if isinstance(layer, snf_ext.SelfNormConv2d):
            layer._cache = exact.FactorizationCache()


def nll(flow: snf_ext.Flow, images: Tensor) -> Tensor:
    forget(flow)
    return evaluate.negative_log_likelihood(flow, images)


@torch.no_grad()
def samples(flow: snf_ext.Flow, keep: bool = False) -> Tensor:
    if not keep:
        forget(flow)
    with seeded(torch.device("cpu"), 0, "samples"):
        return flow.sample(SAMPLES, exact=True)


@torch.no_grad()
def unrounded(flow: snf_ext.Flow) -> Tensor:
    """The samples in model space, where they are no whole pixels yet."""
    forget(flow)
    _, rest = evaluate.split_preprocessing(flow)
    with seeded(torch.device("cpu"), 0, "samples"):
        noise = torch.randn(SAMPLES, *flow.latent_shape, dtype=next(flow.parameters()).dtype)
    return pull(rest, noise, None, exact=True)


def determinants(flow: snf_ext.Flow) -> Tensor:
    """``log |det|`` of all convolutions, from fresh weights."""
    forget(flow)
    return torch.stack([layer.log_abs_det(size) for layer, size in convolutions(flow)])


def check(flow: snf_ext.Flow, images: Tensor) -> dict[str, float]:
    """Largest relative errors of the package against each dense way.

    Raises:
        RuntimeError: an NLL differs by more than 1e-5 (in float64 1e-6) of itself, or a sample, in
            model space, by more than 1e-4 of the largest element.
    """
    errors = {}
    wide = copy.deepcopy(flow).double()
    for what, model, pictures, tolerance in (
        ("NLL", flow, images, 1e-5),
        ("NLL in float64", wide, images[:500].double(), 1e-6),
    ):
        found = _run(NLL, lambda model=model, pictures=pictures: nll(model, pictures))
        for name, value in found.items():
            error = ((value - found[PACKAGE]) / found[PACKAGE]).abs().max().item()
            errors |= _checked(f"{what}, {name}", error, tolerance)
    for what, model in (("samples", flow), ("samples in float64", wide)):
        found = _run(SAMPLE, lambda model=model: unrounded(model))
        for name, value in found.items():
            error = ((value - found[PACKAGE]).abs().max() / value.abs().max()).item()
            errors |= _checked(f"{what}, {name}", error, 1e-4)
    return errors


def _run(ways: Mapping[str, Context], function: Callable[[], Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, context in ways.items():
        if name != ELSE:
            with context():
                found[name] = function()
    return found


def _checked(what: str, error: float, tolerance: float) -> dict[str, float]:
    if what.endswith(PACKAGE):
        return {}
    print(f"{what}: within {error:.1e} of the package")
    if not error <= tolerance:
        raise RuntimeError(f"{what} differs from the package by {error:.1e}, not {tolerance:g}")
    return {what: error}


def tables(
    flow: snf_ext.Flow, images: Tensor, rounds: int, min_sample: float, rate: float
) -> list[dict[str, Any]]:
    """Times everything, prints three tables and returns their rows."""
    sampling = [Variant(n, lambda: samples(flow), context) for n, context in SAMPLE.items()]
    keeps = copy.deepcopy(flow)  # another way's factorisation must not be left in its caches
    sampling.append(Variant(KEPT, lambda: samples(keeps, keep=True)))
    variants = {
        f"exact NLL of {len(images)}": (
            [Variant(name, lambda: nll(flow, images), context) for name, context in NLL.items()],
            {"dense, once a weight": NLL_TARGET},
        ),
        f"{len(convolutions(flow))} determinants": (
            [
                Variant(name, lambda: determinants(flow), NLL[name])
                for name in (PACKAGE, "dense, once a weight", "dense float32, once a batch")
            ],
            {},
        ),
        f"{SAMPLES} exact samples": (sampling, {"dense inverse": SAMPLE_TARGET}),
    }
    rows = []
    for case, (compared, targets) in variants.items():
        timings = interleave(compared, rounds=rounds, min_sample=min_sample)
        found = report.rows(case, timings, flops=0.0, targets=targets, rate=rate)
        report.print_table(found)
        rows += found
    return rows


@torch.no_grad()
def layer_seconds(flow: snf_ext.Flow, images: Tensor) -> dict[str, float]:
    """Seconds of a pass without determinants, by the class of layer."""
    seconds: dict[str, float] = {}
    for _ in range(2):  # the first one warms
        seconds.clear()
        forget(flow)
        with swapped(Nothing):
            for pictures in images.split(evaluate.BATCH):
                x = pictures.float()
                for bijection in flow.bijections:
                    begin = time.perf_counter()
                    x = bijection.exact_forward(x).z  # type: ignore[operator]
                    name = type(bijection).__name__
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
    forget(flow)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def profile(rows: Sequence[Mapping[str, Any]], layers: Mapping[str, float]) -> str:
    """Which part of the likelihood's time determinants are, and so what ratio they allow."""
    likelihood, determinant, _ = (
        {r["variant"]: r["median_s"] for r in rows if r["case"] == case}
        for case in dict.fromkeys(r["case"] for r in rows)
    )
    dense = "dense, once a weight"
    lines = [
        f"of the NLL's {likelihood[name] * 1e3:.0f} ms, determinants are "
        f"{determinant[name] * 1e3:.1f} ms ({100 * determinant[name] / likelihood[name]:.0f} %) "
        f"with {name}"
        for name in (PACKAGE, dense)
    ]
    most = (likelihood[ELSE] + determinant[dense]) / likelihood[ELSE]
    lines.append(
        f"all else takes {likelihood[ELSE] * 1e3:.0f} ms either way: free determinants would make "
        f"it {most:.2f} times faster than dense, and the determinants alone are "
        f"{determinant[dense] / determinant[PACKAGE]:.1f} times faster"
    )
    listed = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in layers.items())
    lines.append(f"all else in one pass: {listed}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    data = read_images(args.data_dir)
    training, images = data[:50_000], data[50_000:60_000][: args.images]
    if len(images) < args.images:
        print(f"MNIST's 60,000 training images are needed; got {len(data)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    noise = machine_noise()
    print(f"{noise}; {torch.get_num_threads()} threads")
    command = f"python -m bench.exact_flow --images {args.images} --rounds {args.rounds}"
    command += f" --threads {args.threads}" if args.threads else ""
    environment = report.environment(command)
    case = next(c for c in MODELS if c.model == "conv")
    flow = trained(case, training)
    errors = check(flow, images)
    print()
    rows = tables(flow, images, args.rounds, args.min_sample, noise.rate)
    layers = layer_seconds(flow, images)
    print(profile(rows, layers))
    after = machine_noise()
    print(f"afterwards, {after}")
    if args.out:
        record = {
            "suite": "exact_flow",
            "environment": environment,
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(after),
            "errors": errors,
            "profile": profile(rows, layers).splitlines(),
            "layer_seconds": layers,
            "rows": rows,
        }
        report.write_json(args.out, record)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exact_flow", description="Exact likelihood and samples at scale."
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--min-sample", type=float, default=0.02, help="seconds (default 0.02)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    for name in ("images", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
