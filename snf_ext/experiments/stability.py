"""Rows that are first steps of training: whether they stay finite, and what couplings give out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..layers import coupling_outputs, initialize
from ..training.optimizers import OPTIMIZERS
from .plan import Numbers, Place, Row, Unit, data_of, runs_of

DIVERGED = 1000.0  # bits/dim


@dataclass(frozen=True)
class Run:
    """The settings of one run: Glow with LU mixing, RAdam, bits/dim."""

    experiment: str
    name: str
    batch_size: int
    lr: float
    penalty: float
    init_images: int  # that actnorm starts from
    coupling: str = "additive"
    levels: int = 4
    steps: int = 16
    width: int = 64


def train(
    settings: Run,
    images: Tensor,
    updates: int,
    seed: int,
    device: torch.device | None = None,
    pixel_levels: int = 256,
) -> dict[str, Any]:
    """Train for ``updates`` steps, or until the objective is not finite or over 1,000 bits/dim.

    Args:
        settings: of the run.
        images: raw; the first ``init_images`` start actnorm, the others train, in order.
        updates: steps.
        seed: of initialisation and noise.
        device: where; the CPU if None.
        pixel_levels: number of values of a pixel.

    Returns:
        Bits/dim of every step, and each coupling's largest |output| after one update, None where
        a number is not finite.

    Source: SFM 4 and 5.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _train(settings, images, updates, device, pixel_levels)


def _train(
    settings: Run, images: Tensor, updates: int, device: torch.device, pixel_levels: int
) -> dict[str, Any]:
    flow = models.glow(
        (images.shape[1], images.shape[2], images.shape[3]),
        settings.levels,
        settings.steps,
        settings.width,
        "lu",
        coupling=settings.coupling,
        pixel_levels=pixel_levels,
    ).to(device)
    flow.train()
    start, rest = images[: settings.init_images], images[settings.init_images :]
    # In parts only for speed: the statistics are those of all images together.
    initialize(flow, list(start.to(device).float().split(32)))
    optimizer = OPTIMIZERS["radam"](flow.parameters(), settings.lr, False)
    bits: list[float] = []
    outputs: list[float] = []
    dets: list[float] = []
    began = time.perf_counter()
    for update, batch in enumerate(_batches(rest, settings.batch_size)):
        if update == updates:
            break
        optimizer.zero_grad()
        with coupling_outputs(flow) as largest:
            loss = flow.loss(batch.to(device).float(), bits_per_dim=True)
        if update == 1:
            outputs = [value.item() for value in largest.values()]
        bits.append(loss.item())
        if not abs(bits[-1]) < DIVERGED:
            break
        squares = flow.squared_log_dets()
        dets.append(squares.item())
        loss = loss + settings.penalty * squares
        loss.backward()
        optimizer.step()
    diverged = not abs(bits[-1]) < DIVERGED
    return {
        "settings": asdict(settings),
        "diverged_at": len(bits) - 1 if diverged else None,
        "bits_per_dim": [value if math.isfinite(value) else None for value in bits],
        "largest_outputs_after_one_update": [v if math.isfinite(v) else None for v in outputs],
        "squared_log_dets": {
            "first": dets[0] if dets else None,
            "largest": max(dets, default=None),
            "last": dets[-1] if dets else None,
        },
        "seconds": time.perf_counter() - began,
    }


def _batches(images: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from images.split(size)


@dataclass(frozen=True)
class FirstSteps:
    """Runs of :func:`train`, each on the training images in an order of its seed."""

    seeded: bool = True

    def data(self, rows: Sequence[Row]) -> set[str]:
        """The data sets of the rows."""
        return data_of(rows)

    def units(self, rows: Sequence[Row], seeds: int) -> list[Unit]:
        """One run a row and seed; short, so that one which was cut off starts again."""
        return runs_of(rows, seeds, lambda row, seed: {**row.flat(), "seed": seed}, self._perform)

    def _perform(self, row: Row, seed: int, folder: Path, place: Place) -> Numbers:
        data, settings = place.data[row.data], dict(row.settings)
        updates, levels = settings.pop("updates"), data.pixel_levels
        assert levels is not None  # of images
        generator = torch.Generator().manual_seed(seed)
        images = data.train[torch.randperm(len(data.train), generator=generator)]
        run = Run("actnorm", row.name, **settings, **row.model_args)
        found = train(run, images, updates, seed, place.device, levels)
        bits = [value for value in found["bits_per_dim"][-50:] if value is not None]
        outputs = [v for v in found["largest_outputs_after_one_update"] if v is not None]
        numbers: Numbers = {
            "last_bits": sum(bits) / len(bits) if bits and found["diverged_at"] is None else None,
            "largest_output": max(outputs, default=None),
            "first_bits": found["bits_per_dim"][0],
            "steps": len(found["bits_per_dim"]),
            **{name: found[name] for name in found if name != "settings"},
        }
        return numbers
