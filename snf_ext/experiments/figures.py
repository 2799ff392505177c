"""Figures 2 to 5 of SNF."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training import checkpoint
from ..training.data import Dataset
from ..training.seeds import seeded
from . import draw, tables
from .plan import Experiment, Measure, Numbers, Paper, Place, Row
from .timed import VECTORS, Timed
from .trained import Trained

SAMPLES = 64


@torch.no_grad()
def samples(folder: Path, model: dict[str, Any], data: Dataset, seed: int, place: Place) -> Numbers:
    """Samples of the best epoch by both inverses from the same noise, kept in ``samples.npz``."""
    levels = data.pixel_levels
    assert levels is not None  # of images
    flow = place.build(model).to(place.device)
    checkpoint.load_weights(flow, checkpoint.load(folder / "best.pt"), folder / "best.pt")
    sides: dict[str, Any] = {}
    for side in ("exact", "learned"):
        with seeded(place.device, seed, "sample"):
            images = flow.eval().sample(SAMPLES, exact=side == "exact")
        sides[side] = images.double().cpu().numpy()
    with checkpoint.write_aside(folder / "samples.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, pixel_levels=np.array(levels), **sides)
    square = ((sides["learned"] - sides["exact"]) / (levels - 1)) ** 2
    finite = np.isfinite(square)
    return {
        "difference": float(square[finite].mean()) if finite.any() else None,
        "pixels_not_finite": int((~finite).sum()),
    }


FIGURE2 = Experiment(
    "Figure 2 of SNF: samples by the exact and by the learned inverse",
    Trained(extra=samples),
    tuple(replace(row, paper={}) for row in (tables.SNF_FC, tables.SNF_CONV, tables.SNF_GLOW)),
    (Measure("difference", "mean squared difference", 6), tables.NATS),
    draw.sample_pairs,
    (
        f"{SAMPLES} samples a side from the same noise; the difference is between their pixels, "
        "rounded to whole values and scaled to 0..1. The paper shows pictures only.",
    ),
)


def _measured(row: Row, **paper: Paper) -> Row:
    return replace(row, paper=paper, settings={**row.settings, "angle_every": 1})


FIGURE3 = Experiment(
    "Figure 3 of SNF: angle between the self-normalizing and the exact gradient",
    Trained(history=("epoch", "angle")),
    (_measured(tables.SNF_FC, angle=Paper(0.1)), _measured(tables.SNF_CONV)),
    (Measure("angle", "degrees", 3), tables.NATS),
    draw.curves([("epoch", "angle", "epoch", "angle, degrees")]),
    (
        "Of each layer's weight gradient, mean over layers. The curve is on 500 validation images "
        "after every epoch; the number on 500 test images at the best one.",
        "The paper reads about 0.1 degrees for FC and under 1 for conv.",
    ),
)
FIGURE5 = Experiment(
    "Figure 5 of SNF: validation NLL against time and against epoch",
    Trained(history=("epoch", "seconds", "val_nll")),
    (tables.EXACT_FC, tables.SNF_FC, tables.EXACT_CONV, tables.SNF_CONV),
    (tables.NATS,),
    draw.curves(
        [
            ("seconds", "val_nll", "training time, s", "validation NLL, nats"),
            ("epoch", "val_nll", "epoch", "validation NLL, nats"),
        ],
        group=True,
    ),
    (
        "Time is that of training steps alone. The paper draws the fully connected model; the "
        "convolutional one is beside it. The numbers are those of Table 1, on test images.",
    ),
)

SIZES = tuple(range(32, 4065, 96))
LARGE = 800  # from here on the products have won over what a step costs at any D


def _layer(kind: str, features: int) -> Row:
    return Row(
        f"{draw.LAYERS[kind]}-{features}",
        f"{draw.LAYERS[kind]}, D = {features}",
        "linear",
        {"linear": kind, "features": features},
        VECTORS,
        {"batch_size": 128, "lr": 1e-4, "batches": 4000, "warmup": 100},
        group=f"D-{features}",
        reduced={"cpu": {"batches": 20, "warmup": 3}, "smoke": {"batches": 5, "warmup": 2}},
    )


def exponents(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Slopes of log time on log D by least squares, over D >= 800 where there are three."""
    fits = {}
    for kind in draw.LAYERS:
        times = {
            row["settings"]["features"]: row["measures"]["batch_ms"]["mean"]
            for row in rows
            if row["runs"] and row["settings"]["linear"] == kind
        }
        times = {size: time for size, time in times.items() if time is not None}
        large = {size: time for size, time in times.items() if size >= LARGE}
        used = large if len(large) >= 3 else times
        if len(used) < 3:
            continue
        across, up = ([math.log(v) for v in values] for values in (used, used.values()))
        slope = float(np.polyfit(across, up, 1)[0])
        fits[kind] = {
            "exponent": slope,
            "first": min(used),
            "last": max(used),
            "says": f"time ~ D^{slope:.2f} over D = {min(used)} to {max(used)}",
        }
    return fits


def _names(sizes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"{name}-{size}" for size in sizes for name in draw.LAYERS.values())


FIGURE4 = Experiment(
    "Figure 4 of SNF: time per batch of one fully connected layer by D",
    Timed(samples=False),
    tuple(_layer(kind, size) for size in SIZES for kind in draw.LAYERS),
    (Measure("batch_ms", "ms a batch", 3),),
    draw.against_size,
    (
        "One layer on a standard normal base, batches of 128 random vectors; loss, gradients and "
        "Adam. The paper prints no numbers.",
    ),
    only={
        "cpu": _names(tuple(size for size in SIZES if size <= 2048)),
        "smoke": _names((32, 128, 224)),
    },
    fit=exponents,
)
