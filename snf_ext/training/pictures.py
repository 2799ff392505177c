"""Pictures of a run, as PNG files: samples, reconstructions, curves.

Images are shown as grids, points in a plane by :mod:`snf_ext.training.scatter`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import Flow
from . import scatter
from .checkpoint import write_aside
from .context import context_of, rows_of_classes
from .errors import require
from .evaluate import device_of
from .seeds import seeded

CURVES = (
    ("train_loss", "training objective"),
    ("val_nll", "validation NLL, exact (nats)"),
    ("recon", "reconstruction error"),
    ("angle", "angle to the exact gradient (degrees)"),
)


def grid(images: Tensor, pixel_levels: int, columns: int | None = None) -> Tensor:
    """Tile images into one picture.

    Args:
        images: ``(N, C, H, W)``, C 1 or 3, values 0 .. pixel_levels - 1; what lies outside is
            clamped, what is not a number is shown black.
        pixel_levels: number of values.
        columns: of the grid; about as many as rows if None.

    Returns:
        ``(height, width, C)`` float32 in [0, 1], one black pixel between images.

    >>> grid(torch.full((4, 1, 2, 2), 16), pixel_levels=17).shape
    torch.Size([5, 5, 1])
    """
    count, channels, height, width = images.shape
    columns = columns or max(1, math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    scaled = images.detach().cpu().float().nan_to_num(0.0).clamp(0, pixel_levels - 1) / (
        pixel_levels - 1
    )
    canvas = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1, channels)
    for index, image in enumerate(scaled):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return canvas


@torch.no_grad()
def save_samples(
    path: Path,
    flow: Flow,
    pixel_levels: int | None,
    count: int = 64,
    seed: int = 0,
    temperature: float = 1.0,
    sides: tuple[str, ...] = ("learned", "exact"),
    label: int | None = None,
    refine: int = 0,
    data: Tensor | None = None,
) -> None:
    """Samples from one noise, by the learned and by the exact inverse side by side (SNF Figure 2).

    Args:
        path: the PNG file.
        flow: with images or points in a plane as events; beside those stands their density.
        pixel_levels: number of values of a pixel; None for points.
        count: samples a side.
        seed: of the noise.
        temperature: standard deviation of the noise.
        sides: which inverses to show, of "learned", "exact" and "refined".
        label: the class of all samples of a conditional flow; one row a class if None.
        refine: steps of the refined inverses.
        data: points, of which as many are shown beside the samples.
    """
    device, samples = device_of(flow), {}
    labels, columns, kind = None, None, ""
    if label is not None:
        labels, kind = torch.full((count,), label), f" of class {label}"
    elif flow.context_features:
        labels, columns = rows_of_classes(count, flow.context_features)
        kind = ", one row a class,"
    context = context_of(flow, labels)
    for side in sides:
        with seeded(device, seed, "sample"):
            samples[f"{side} inverse"] = flow.sample(
                count,
                context,
                exact=side == "exact",
                temperature=temperature,
                refine=refine if side == "refined" else 0,
            )
    title = f"{count} samples{kind} from the same noise"
    if pixel_levels is None:
        shown = {} if data is None else {"data": data[:count]}
        _save(path, scatter.points(title, shown | samples, None if context is not None else flow))
        return
    _save_panels(path, title, samples, pixel_levels, columns)


@torch.no_grad()
def save_reconstructions(
    path: Path,
    flow: Flow,
    images: Tensor,
    pixel_levels: int | None,
    seed: int = 0,
    context: Tensor | None = None,
) -> None:
    """Images or points, and what the learned and the exact inverse make of their noise.

    Args:
        path: the PNG file.
        flow: with images or points in a plane as events.
        images: raw, ``(N, C, H, W)`` or ``(N, 2)``.
        pixel_levels: number of values of a pixel; None for points.
        seed: of the dequantization.
        context: of each image, for a conditional flow.
    """
    device, training = device_of(flow), flow.training
    with seeded(device, seed, "reconstruct"):
        z = flow.eval()(images.to(device), context).z
        flow.train(training)
    learned, exact = flow.inverse(z, context), flow.inverse(z, context, exact=True)
    panels = {"data": images, "learned inverse": learned, "exact inverse": exact}
    title = "reconstructions x → z → x"
    if pixel_levels is None:
        _save(path, scatter.points(title, panels))
        return
    _save_panels(path, title, panels, pixel_levels)


def save_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """The history of a run: objective, exact validation NLL, reconstruction error, angle.

    Args:
        path: the PNG file.
        history: rows as in :class:`~snf_ext.training.loop.Trainer`.
        title: of the picture.
    """
    figure = require("matplotlib.figure").Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
        axes.set(title=label, xlabel="epoch")
        axes.grid(alpha=0.3)
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        if name in ("recon", "angle") and any(value > 0 for _, value in points):
            axes.set_yscale("log")
    _save(path, figure)


def _save_panels(
    path: Path,
    title: str,
    panels: dict[str, Tensor],
    pixel_levels: int,
    columns: int | None = None,
) -> None:
    width = 4 * len(panels)
    figure = require("matplotlib.figure").Figure(figsize=(width, 4.6), layout="constrained")
    figure.suptitle(title)
    every = figure.subplots(1, len(panels), squeeze=False).flat
    for axes, (name, images) in zip(every, panels.items(), strict=True):
        axes.set_title(name + scatter.not_finite(images))
        axes.axis("off")
        picture = grid(images, pixel_levels, columns)
        single = picture.shape[2] == 1
        shown = picture[:, :, 0] if single else picture
        axes.imshow(shown.numpy(), cmap="gray" if single else None, vmin=0, vmax=1)
    _save(path, figure)


def _save(path: Path, figure: Any) -> None:
    with write_aside(path) as part:
        figure.savefig(part, format="png", dpi=100)
