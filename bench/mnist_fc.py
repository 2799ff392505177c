"""Trains the 2-layer fully connected flow on MNIST beside the public code's curve.

    python -m bench.mnist_fc --data-dir DIR [--epochs 5] [--variant native] [--out FILE.json]

Same start and settings as the public code at its latest commit: W = R = I, bias normal with the
standard deviation of the identity's entries, batch 100, the first 50,000 training images in the
order of the file, Adam at 1e-4 warmed up linearly per step over 10 epochs, float32. After every
epoch the exact negative log-likelihood of the last 10,000 training images, in nats. The time per
step is quoted as a multiple of a 1024^3 float32 product, timed every 25 steps of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import snf_ext

from . import report
from .composition import ComposedFC
from .timing import machine_noise, product_step, quartiles

# Exact validation NLL of the public code before training and after epochs 1 to 5, nats.
PUBLIC = (3263.6, 1901.0, 1516.9, 1388.2, 1318.0, 1269.8)
BATCH, RATE, WARM_UP_EPOCHS = 100, 1e-4, 10
PRODUCT_EVERY = 25


@torch.no_grad()
def identity_start(layers: Iterable[nn.Module], seed: int) -> None:
    """W = R = I; the bias as the public code draws it, from the identity's own deviation."""
    torch.manual_seed(seed)
    for layer in layers:
        for weight in (layer.weight, layer.weight_inv):
            features = weight.shape[0]
            weight.copy_(torch.eye(features).view(weight.shape))
        nn.init.normal_(layer.bias, std=torch.eye(features).std().item())


def build(variant: str, seed: int) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """The model, and the function that leaves one batch's gradients in its parameters."""
    if variant == "composed":
        composed = ComposedFC()
        identity_start(composed.linears, seed)
        return composed, composed.training_backward
    flow = snf_ext.models.fc()
    identity_start((m for m in flow.modules() if isinstance(m, snf_ext.SelfNormLinear)), seed)
    return flow, lambda x: flow.loss(x).backward()


def train_epoch(
    model: nn.Module,
    backward: Callable[[Tensor], None],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    epoch: int,
) -> tuple[list[float], list[float]]:
    """One pass in the order of the file; returns the seconds of steps and of products."""
    model.train()
    product = product_step()
    per_epoch = len(images) // BATCH
    steps, products = [], []
    for i, batch in enumerate(images.split(BATCH)):
        rate = RATE * min(1.0, ((i + 1) + (epoch - 1) * per_epoch) / (WARM_UP_EPOCHS * per_epoch))
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
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
        command = f"python -m bench.mnist_fc --epochs {args.epochs} --variant {args.variant}"
        command += f" --seed {args.seed}" + (" --fused-adam" if args.fused_adam else "")
        result = {
            "suite": "mnist_fc",
            "environment": report.environment(command),
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(machine_noise()),
            "rows": rows,
        }
        report.write_json(args.out, result)
    return 0


def _run(args: argparse.Namespace, train: Tensor, validation: Tensor) -> list[dict[str, Any]]:
    model, backward = build(args.variant, args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=args.fused_adam or None)
    print(f"{args.variant}:\nepoch  exact NLL    public      diff   ms/step  / 1024^3 product")
    rows: list[dict[str, Any]] = []
    for epoch in range(args.epochs + 1):
        if epoch:
            steps, products = train_epoch(model, backward, optimizer, train, epoch)
        nll = exact_nll(model, validation)
        public = PUBLIC[epoch] if epoch < len(PUBLIC) else None
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
    if "step_s" in row:
        line += f"  {row['step_s'] * 1e3:>8.2f}  {row['step_in_products']:.2f}"
    print(line, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mnist_fc", description="Early MNIST training beside the public code."
    )
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
