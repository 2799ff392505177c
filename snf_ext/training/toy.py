"""Two-dimensional densities: continuous data of which a picture shows everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from .dataset import Dataset
from .errors import UserError
from .seeds import derive_seed


def moons(count: int, generator: Generator | None = None) -> Tensor:
    """Two half circles that reach into each other, with noise of 0.1."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = (torch.rand(count, generator=generator) < 0.5).float()
    sign = 2 * upper - 1
    x = sign * angle.cos() + (1 - upper)
    y = sign * angle.sin() + 0.5 * (1 - upper)
    noise = 0.1 * torch.randn(count, 2, generator=generator)
    points = torch.stack((x - 0.5, y - 0.25), 1) + noise
    return points * torch.tensor([1.15, 2.0])


def rings(count: int, generator: Generator | None = None) -> Tensor:
    """Three circles around the origin, equally likely, with noise of 0.08 across."""
    number = torch.randint(1, 4, (count,), generator=generator)
    radius = 0.6 * number + 0.08 * torch.randn(count, generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


def checkerboard(count: int, generator: Generator | None = None) -> Tensor:
    """Uniform on the eight dark fields of a board of four by four, of side 4."""
    column = torch.randint(0, 4, (count,), generator=generator)
    row = 2 * torch.randint(0, 2, (count,), generator=generator) + column % 2
    return torch.stack((column, row), 1) + torch.rand(count, 2, generator=generator) - 2


# Each draws (count, 2) float32, centred, of unit scale; from torch's own generator if None.
DENSITIES: dict[str, Callable[..., Tensor]] = {
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
}


def load_toy(
    name: str,
    data_dir: Path | None = None,
    labels: bool = False,
    *,
    train: int = 10_000,
    val: int = 2_000,
    test: int = 10_000,
) -> Dataset:
    """Points of a density of ``DENSITIES``, ``(N, 2)``: the same in every run, whatever its seed.

    They are drawn, not read, and ``pixel_levels`` is None: continuous data, whose likelihood is a
    density in nats. The caller's random numbers stay untouched.

    Args:
        name: a key of ``DENSITIES``.
        data_dir: not needed.
        labels: must be False: points have no classes.
        train, val, test: how many points each split has.

    Raises:
        UserError: labels were asked for.

    >>> moons = load_toy("moons")
    >>> moons.event_shape, moons.pixel_levels, len(moons.train)
    ((2,), None, 10000)
    """
    if labels:
        raise UserError(f"{name} has no classes; leave out --conditional")

    def points(split: str, count: int) -> Tensor:
        return DENSITIES[name](count, Generator().manual_seed(derive_seed(name, split)))

    splits = points("train", train), points("val", val), points("test", test)
    return Dataset(name, *splits, (2,), None)
