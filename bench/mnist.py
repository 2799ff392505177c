"""Trains a model of the paper on MNIST beside the public code's curve.

    python -m bench.mnist --model fc|conv --data-dir DIR [--epochs 5] [--variant native] [--out F]

Same start and settings as the public code at its latest commit: batch 100, the first 50,000
training images in the order of the file, Adam warmed up linearly per step over 10 epochs, lambda 1,
float32. After every epoch the exact negative log-likelihood of the last 10,000 training images, in
nats. The time per step is quoted as a multiple of a 1024^3 float32 product, timed every 25 steps of
the same run.

- fc: 2 linear layers, W = R = I, bias normal with the deviation of the identity's entries; 1e-4.
- conv: 9 convolutions with splines, w = Dirac + Xavier-normal noise of gain 0.01, r = flip(w), bias
  normal with the deviation of that noise; 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import snf_ext

from . import report
from .cases import MODELS, ModelCase
from .models import composed_like, copy_parameters, make_flow
from .timing import machine_noise, product_step, quartiles

# Exact validation NLL of the public code after so many epochs, nats; conv with another seed.
PUBLIC = {
    "fc": {0: 3263.6, 1: 1901.0, 2: 1516.9, 3: 1388.2, 4: 1318.0, 5: 1269.8},
    "conv": {1: 1906.8},
}
RATES = {"fc": 1e-4, "conv": 1e-3}
BATCH, WARM_UP_EPOCHS = 100, 10
PRODUCT_EVERY = 25


@torch.no_grad()
def public_start(flow: nn.Module) -> None:
    """The public code's start where the package has another: W = R = I for fc, and the biases."""
    for layer in flow.modules():
        if isinstance(layer, snf_ext.SelfNormLinear):
            eye = torch.eye(layer.features)
            layer.weight.copy_(eye)
            layer.weight_inv.copy_(eye)
            nn.init.normal_(layer.bias, std=eye.std().item())
        elif isinstance(layer, snf_ext.SelfNormConv2d):
            noise = layer.weight - nn.init.dirac_(torch.empty_like(layer.weight))
            nn.init.normal_(layer.bias, std=noise.std().item())


def build(case: ModelCase, variant: str, seed: int) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """The model, and the function that leaves one batch's gradients in its parameters."""
    torch.manual_seed(seed + 1)  # another stream than that of the biases and what follows
    flow = make_flow(case)
    composed = composed_like(flow, case) if variant == "composed" else None
    torch.manual_seed(seed)
    public_start(flow)
    if composed is None:
        return flow, lambda x: flow.loss(x).backward()
    copy_parameters(flow, composed)
    return composed, composed.training_backward


def train_epoch(
    model: nn.Module,
    backward: Callable[[Tensor], None],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    epoch: int,
    rate: float,
) -> tuple[list[float], list[float]]:
    """One pass in the order of the file; returns the seconds of steps and of products."""
    model.train()
    product = product_step()
    per_epoch = len(images) // BATCH
    steps, products = [], []
    for i, batch in enumerate(images.split(BATCH)):
        done = (i + 1) + (epoch - 1) * per_epoch
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, done / (WARM_UP_EPOCHS * per_epoch))
        optimizer.zero_grad()
        backward(batch.float())
        optimizer.step()
        steps.append(time.perf_counter() - start)
        if i % PRODUCT_EVERY == 0:
            product()  # warms its matrices
            start = time.perf_counter()
            product()
            products.append(time.perf_counter() - start)
    return steps, products


@torch.no_grad()
def exact_nll(model: nn.Module, images: Tensor) -> float:
    """Mean exact negative log-likelihood in nats, one draw of the dequantization noise."""
    model.eval()
    total = sum(-model.log_prob(batch.float()).double().sum() for batch in images.split(1000))
    return float(total) / len(images)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = read_images(args.data_dir)
    train, validation = images[:50_000], images[50_000:60_000]
    if len(validation) == 0:
        print(f"MNIST's 60,000 training images are needed; got {len(images)}", file=sys.stderr)
        return 2

    noise = machine_noise()
    print(f"{noise}; {torch.get_num_threads()} threads")
    package = args.variant in ("native", "reference")
    context = snf_ext.use_backend(args.variant) if package else contextlib.nullcontext()
    with context:
        rows = _run(args, train, validation)

    if args.out:
        command = f"python -m bench.mnist --model {args.model} --epochs {args.epochs}"
        command += f" --variant {args.variant}"
        command += f" --seed {args.seed}" + (" --fused-adam" if args.fused_adam else "")
        result = {
            "suite": f"mnist_{args.model}",
            "environment": report.environment(command),
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(machine_noise()),
            "rows": rows,
        }
        report.write_json(args.out, result)
    return 0


def _run(args: argparse.Namespace, train: Tensor, validation: Tensor) -> list[dict[str, Any]]:
    case = next(c for c in MODELS if c.model == args.model)
    rate, public_curve = RATES[args.model], PUBLIC[args.model]
    model, backward = build(case, args.variant, args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=args.fused_adam or None)
    print(f"{case.name}, {args.variant}:")
    print("epoch  exact NLL    public      diff   ms/step  / 1024^3 product")
    rows: list[dict[str, Any]] = []
    for epoch in range(args.epochs + 1):
        if epoch:
            steps, products = train_epoch(model, backward, optimizer, train, epoch, rate)
        nll = exact_nll(model, validation)
        public = public_curve.get(epoch)
        row: dict[str, Any] = {
            "epoch": epoch,
            "nll": nll,
            "public_nll": public,
            "percent": None if public is None else 100 * (nll / public - 1),
        }
        if epoch:
            row["step_q1_s"], row["step_s"], row["step_q3_s"] = quartiles(steps)
            row["product_q1_s"], row["product_s"], row["product_q3_s"] = quartiles(products)
            row["step_in_products"] = row["step_s"] / row["product_s"]
        rows.append(row)
        _print(row)
    return rows


def _print(row: dict[str, Any]) -> None:
    line = f"{row['epoch']:>5}  {row['nll']:>9.1f}"
    if row["public_nll"] is not None:
        line += f"  {row['public_nll']:>8.1f}  {row['percent']:>+6.2f} %"
    else:
        line += f"  {'-':>8}  {'-':>8}"
    if "step_s" in row:
        line += f"  {row['step_s'] * 1e3:>8.2f}  {row['step_in_products']:.2f}"
    print(line, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mnist", description="Early MNIST training beside the public code."
    )
    parser.add_argument("--model", choices=sorted(PUBLIC), required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--variant", choices=["native", "reference", "composed"], default="native")
    parser.add_argument("--fused-adam", action="store_true", help="torch's fused Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    if args.epochs < 0:
        parser.error(f"--epochs must not be negative; got {args.epochs}")
    return args


def read_images(folder: Path) -> Tensor:
    """MNIST's training images from its IDX file, plain or gzipped, (N, 1, 28, 28) uint8."""
    names = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise SystemExit(f"--data-dir must hold {' or '.join(names)}; {folder} does not")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, count, height, width = np.frombuffer(raw, ">i4", count=4)
    if magic != 2051 or len(raw) != 16 + count * height * width:
        raise SystemExit(f"{path.name} is not a whole IDX file of images")
    pixels = np.frombuffer(raw, np.uint8, offset=16).copy()
    return torch.from_numpy(pixels).view(count, 1, height, width)


if __name__ == "__main__":
    sys.exit(main())
