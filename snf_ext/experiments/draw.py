"""The pictures of experiments, as PNG files written aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training.checkpoint import write_aside
from ..training.errors import require
from ..training.npz import read_npz
from ..training.pictures import grid

Draw = Callable[[dict[str, Any], Path, Path], None]
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")
LAYERS = {"self_norm": "snf", "exact": "exact"}  # of Figure 4, as its rows are named


def bars(record: dict[str, Any], folder: Path, path: Path) -> None:
    """Each row's number with its deviation; the paper's beside it where they can be compared."""
    measures = record["measures"]
    height = 1.5 + 0.35 * len(record["rows"])
    figure = _figure(record, 6.5 * len(measures), height)
    names = [row["title"] + (" (ours)" if row["ours"] else "") for row in record["rows"]]
    panels = figure.subplots(1, len(measures), squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=True):
        found = [row["measures"][measure["key"]] for row in record["rows"]]
        _points(axes, found, "mean", "std", "here", "o")
        if record["comparable"]:
            _points(axes, found, "paper", "paper_std", "paper", "x")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(measure["unit"])
        axes.grid(alpha=0.3)
        axes.legend()
    _save(path, figure)


def _points(axes: Any, found: list[Any], mean: str, std: str, label: str, marker: str) -> None:
    kept = [(i, f) for i, f in enumerate(found) if f[mean] is not None]
    values, at = [f[mean] for _, f in kept], [i for i, _ in kept]
    spread = [f[std] or 0.0 for _, f in kept]
    axes.errorbar(values, at, xerr=spread, fmt=marker, capsize=3, label=label)


def curves(panels: Iterable[tuple[str, str, str, str]], group: bool = False) -> Draw:
    """Columns of the histories: a line a row, mean and deviation over seeds.

    Args:
        panels: ``(column across, column up, label across, label up)`` of each.
        group: a row of panels for each model.
    """
    panels = list(panels)

    def draw(record: dict[str, Any], folder: Path, path: Path) -> None:
        kinds = sorted({row["settings"]["model"] for row in record["rows"]}) if group else [None]
        figure = _figure(record, 5.5 * len(panels), 4 * len(kinds))
        every = figure.subplots(len(kinds), len(panels), squeeze=False)
        for line, kind in zip(every, kinds, strict=True):
            rows = [r for r in record["rows"] if kind in (None, r["settings"]["model"])]
            for axes, (across, up, label_across, label_up) in zip(line, panels, strict=True):
                for row, color in zip(rows, COLORS, strict=False):
                    _curve(axes, row, across, up, color)
                axes.set(xlabel=label_across, ylabel=label_up)
                axes.grid(alpha=0.3)
                if axes.lines:
                    axes.legend(fontsize=8)
                if up == "angle" and any((line.get_ydata() > 0).any() for line in axes.lines):
                    axes.set_yscale("log")
        _save(path, figure)

    return draw


def _curve(axes: Any, row: Mapping[str, Any], across: str, up: str, color: str) -> None:
    histories = [run["history"] for run in row["runs"] if "history" in run]
    if not histories:
        return
    shortest = min(len(h[up]) for h in histories)
    values = np.array([[np.nan if v is None else v for v in h[up][:shortest]] for h in histories])
    places = np.array([h[across][:shortest] for h in histories]).mean(0)
    there = np.isfinite(values).all(0)
    mean, places = values[:, there].mean(0), places[there]
    marker = "." if len(mean) < 30 else None
    axes.plot(places, mean, color=color, marker=marker, label=row["title"])
    if len(histories) > 1:
        spread = values[:, there].std(0, ddof=1)
        axes.fill_between(places, mean - spread, mean + spread, color=color, alpha=0.2)


def against_size(record: dict[str, Any], folder: Path, path: Path) -> None:
    """Time against D on logarithmic axes, a line a layer, with the quartiles."""
    figure = _figure(record, 7, 5)
    axes = figure.subplots()
    for kind, label in LAYERS.items():
        rows = [r for r in record["rows"] if r["runs"] and r["settings"]["linear"] == kind]
        sizes = [row["settings"]["features"] for row in rows]
        found = [row["measures"]["batch_ms"] for row in rows]
        if fit := record["fits"].get(kind):
            label += f", time ~ D^{fit['exponent']:.2f}"
        axes.plot(sizes, [f["mean"] for f in found], marker=".", label=label)
        axes.fill_between(sizes, [f["q1"] for f in found], [f["q3"] for f in found], alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="D", ylabel="time per batch, ms")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(path, figure)


def sample_pairs(record: dict[str, Any], folder: Path, path: Path) -> None:
    """Samples of each row's first seed by the exact and by the learned inverse."""
    shown = [r for r in record["rows"] if any("difference" in run for run in r["runs"])]
    if not shown:
        return
    figure = _figure(record, 8, 4.2 * len(shown))
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for line, row in zip(panels, shown, strict=True):
        first = next(run for run in row["runs"] if "difference" in run)
        kept = folder / row["name"] / f"seed-{first['seed']}" / "samples.npz"
        content = read_npz(kept, ("exact", "learned", "pixel_levels"))
        for axes, side in zip(line, ("exact", "learned"), strict=True):
            images = torch.from_numpy(content[side])
            picture = grid(images, int(content["pixel_levels"])).numpy()
            single = picture.shape[2] == 1
            axes.imshow(
                picture[:, :, 0] if single else picture,
                cmap="gray" if single else None,
                vmin=0,
                vmax=1,
            )
            axes.set_title(f"{row['title']}: {side} inverse", fontsize=9)
            axes.axis("off")
    _save(path, figure)


def first_steps(key: str, across: str, up: str) -> Draw:
    """A list that each run has, by its index from 1 on, on a logarithmic axis; a line a run."""

    def draw(record: dict[str, Any], folder: Path, path: Path) -> None:
        figure = _figure(record, 7, 5)
        axes = figure.subplots()
        for row, color in zip(record["rows"], COLORS, strict=False):
            for number, run in enumerate(run for run in row["runs"] if key in run):
                points = [(i, v) for i, v in enumerate(run[key], start=1) if v is not None]
                if points:
                    label = row["title"] if number == 0 else None
                    marker = "." if len(points) < 100 else None
                    axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker)
        axes.set(xlabel=across, ylabel=up, yscale="log")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        _save(path, figure)

    return draw


def _figure(record: Mapping[str, Any], width: float, height: float) -> Any:
    size = (max(width, 7.0), height)  # room for the title
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    reduced = "" if record["comparable"] else f"\nscale {record['scale']}: reduced, see the table"
    figure.suptitle(f"{record['title']}{reduced}", fontsize=9)
    return figure


def _save(path: Path, figure: Any) -> None:
    with write_aside(path) as part:
        figure.savefig(part, format="png", dpi=100)
