"""Small Glow models on MNIST: each mixing layer and both couplings, side by side.

    python -m bench.glow_mnist --data-dir DIR --epochs 2 --out FILE.json --plot FILE.png

Two levels of four steps, width 16 (SNF Table 5), Adam at 1e-3 warmed up over one epoch, batches of
100 in the order of the file, lambda 100, the gradient's norm clipped at 10,000. After each epoch
the exact NLL of the last 10,000 training images in nats; at the end samples by the learned inverse
where there is one, from the same noise for all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.training.checkpoint import write_aside
from snf_ext.training.pictures import grid

from . import report
from .mnist import exact_nll, read_images

BATCH, RATE, CLIP, SHOWN, TEMPERATURE = 100, 1e-3, 1e4, 25, 0.8

VARIANTS: dict[str, dict[str, Any]] = {
    "self-normalizing 1x1": {"mixing": "self_norm"},
    "self-normalizing 5x5": {"mixing": "self_norm", "kernel_size": 5},
    "plain 1x1": {"mixing": "plain"},
    "LU 1x1": {"mixing": "lu"},
    "self-normalizing 1x1, additive": {"mixing": "self_norm", "coupling": "additive"},
    "LU 1x1, additive": {"mixing": "lu", "coupling": "additive"},
}


def train(
    settings: dict[str, Any], images: Tensor, validation: Tensor, epochs: int, seed: int
) -> tuple[snf_ext.Flow, dict[str, Any]]:
    """A trained flow, and its exact NLL after each epoch."""
    torch.manual_seed(seed)
    flow = snf_ext.models.glow((1, 28, 28), 2, 4, 16, **settings).train()
    snf_ext.layers.initialize(flow, [images[:BATCH].float()])
    optimizer = torch.optim.Adam(flow.parameters(), lr=RATE, fused=True)
    per_epoch = len(images) // BATCH
    seconds: list[float] = []
    nll: list[float] = []
    for epoch in range(epochs):
        flow.train()
        for i, batch in enumerate(images.split(BATCH)):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (i + 1 + epoch * per_epoch) / per_epoch)
            optimizer.zero_grad()
            flow.loss(batch.float()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        nll.append(exact_nll(flow, validation))
    return flow, {"settings": settings, "nll": nll, "step_s": statistics.median(seconds)}


@torch.no_grad()
def samples(flow: snf_ext.Flow, seed: int) -> Tensor:
    """A picture of samples; the same noise for every flow."""
    torch.manual_seed(seed)
    return grid(flow.eval().sample(SHOWN, temperature=TEMPERATURE), pixel_levels=256)[:, :, 0]


def draw(
    rows: Sequence[dict[str, Any]], pictures: Sequence[Tensor], title: str, path: Path
) -> None:
    """The samples of every variant, with its NLL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(10, 7.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, row, picture in zip(panels.flat, rows, pictures, strict=False):
        axes.set_title(f"{row['variant']}: {row['nll'][-1]:.1f} nats", fontsize=10)
        axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    for axes in panels.flat:
        axes.axis("off")
    with write_aside(path) as part:
        figure.savefig(part, dpi=100, format="png")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    images = read_images(args.data_dir)
    training, validation = images[:50_000][: args.limit_train], images[50_000:60_000]
    if len(validation) < 10_000:
        print(f"MNIST's 60,000 training images are needed; got {len(images)}", file=sys.stderr)
        return 2
    command = f"python -m bench.glow_mnist --epochs {args.epochs} --seed {args.seed}"
    if args.limit_train is not None:
        command += f" --limit-train {args.limit_train}"
    result: dict[str, Any] = {
        "suite": "glow_mnist",
        "environment": report.environment(command),
        "rows": [],
    }
    pictures = []
    for name, settings in VARIANTS.items():
        flow, row = train(settings, training, validation, args.epochs, args.seed)
        pictures.append(samples(flow, args.seed))
        result["rows"].append({"variant": name, **row})
        nll = ", ".join(f"{value:.1f}" for value in row["nll"])
        print(f"{name}: exact NLL {nll} nats, {row['step_s'] * 1e3:.1f} ms/step", flush=True)
        if args.out:
            report.write_json(args.out, result)
        if args.plot:
            title = (
                f"samples at temperature {TEMPERATURE} after {args.epochs} epochs, and exact "
                f"validation NLL; {report.headline(result['environment'])}"
            )
            draw(result["rows"], pictures, title, args.plot)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.glow_mnist", description="Small Glow models on MNIST."
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit-train", type=int, help="only the first N training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {args.epochs}")
    if args.limit_train is not None and args.limit_train < BATCH:
        parser.error(f"--limit-train must be at least {BATCH}; got {args.limit_train}")
    return args


if __name__ == "__main__":
    sys.exit(main())
