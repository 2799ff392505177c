"""Pictures of points in a plane and of a flow's density there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..flow import Flow
from .errors import require

GRID = 200  # points along each axis of a picture of a density
HALF_SIDE = 3.0  # of the square that is shown where no data say how far it has to reach
POINTS = 2000  # as many as show a density


def points(title: str, panels: dict[str, Tensor], flow: Flow | None = None) -> Any:
    """A figure of points, a panel each, all on one square, and the density of ``flow`` on it.

    Args:
        title: of the figure.
        panels: titles and points ``(N, 2)``. Those out of the square are not seen, and those that
            are not finite are counted in the title.
        flow: with events ``(2,)`` and no context; None to leave the density out.

    Cost: 40,000 exact densities.
    """
    half = _half_side(panels.get("data"))
    count = len(panels) + (flow is not None)
    figure = require("matplotlib.figure").Figure(figsize=(4 * count, 4.6), layout="constrained")
    figure.suptitle(title)
    every = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, x) in zip(every, panels.items(), strict=False):
        axes.set_title(name + not_finite(x))
        axes.scatter(*x.detach().cpu().float().T.numpy(), s=4, linewidths=0)
    if flow is not None:
        every[-1].set_title("density")
        picture = density(flow, half).float().numpy()
        every[-1].imshow(picture, origin="lower", extent=(-half, half, -half, half))
    for axes in every:
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    return figure


@torch.no_grad()
def density(flow: Flow, half_side: float, size: int = GRID) -> Tensor:
    """``p(x)`` at the midpoints of ``size^2`` fields of ``[-half_side, half_side]^2``.

    Returns:
        ``(size, size)`` float64 on the CPU: rows along the second coordinate, upwards.

    >>> import snf_ext
    >>> flow = snf_ext.Flow([snf_ext.SelfNormLinear(2)], (2,))
    >>> round(density(flow, 8.0, 80).sum().item() * 0.2**2, 3)
    1.0
    """
    axis = half_side * ((2 * torch.arange(size) + 1) / size - 1)
    second, first = torch.meshgrid(axis, axis, indexing="ij")
    fields = torch.stack((first, second), -1).view(-1, 2)
    like = next(flow.parameters(), fields)
    training = flow.training
    flow.eval()
    logs = [flow.log_prob(x.to(like)).double().cpu() for x in fields.split(10_000)]
    flow.train(training)
    return torch.cat(logs).exp().view(size, size)


def not_finite(x: Tensor) -> str:
    """How many of the samples ``(N, ...)`` are not finite, for a title; empty if all are."""
    bad = int((~x.flatten(1).isfinite().all(1)).sum())
    return f" ({bad} not finite)" if bad else ""


def _half_side(data: Tensor | None) -> float:
    return HALF_SIDE if data is None or not len(data) else 1.25 * data.abs().max().item()
