"""Draws a result file of ``bench.compare``: ``python -m bench.plot FILE.json FILE.png``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .plot_figure4 import draw_figure4
from .report import headline

__all__ = ["draw"]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Linear, figure4: time against size. Others: time relative to native or to the package.

    Of a GPU: times beside their floor, case by case.
    """
    rows = result["rows"]
    if result["suite"] == "figure4":
        figure = plt.figure(figsize=(11.0, 5.5), layout="constrained")
        draw_figure4(figure, result)
    else:
        height = max(5.0, 0.2 * len({r["case"] for r in rows}))
        kind = _curves if result["suite"] == "linear" else _dots
        if "gpu" in result["environment"]:
            kind, height = _floors, max(5.0, 0.15 * len({(r["case"], _eager(r)) for r in rows}))
        figure, axes = plt.subplots(figsize=(8.0, height), layout="constrained")
        kind(axes, rows)
    figure.suptitle(headline(result["environment"]), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(aside, dpi=150, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        plt.close(figure)


def _eager(row: Mapping[str, Any]) -> str:
    """The name of a variant without how it is launched."""
    return row["variant"].removesuffix(", graph")


def _by_variant(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    return variants


def _curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name, found in _by_variant(rows).items():
        features = [int(r["case"].removeprefix("D=")) for r in found]
        middle = [r["median_s"] * 1e3 for r in found]
        spread = [
            [(r["median_s"] - r["q1_s"]) * 1e3 for r in found],
            [(r["q3_s"] - r["median_s"]) * 1e3 for r in found],
        ]
        style = {"linestyle": "--"} if name.startswith("products") else {"marker": "o"}
        width = 2.5 if name == "native" else 1.2
        axes.errorbar(
            features, middle, yerr=spread, label=name, linewidth=width, capsize=2, **style
        )
    axes.set(xscale="log", yscale="log", xlabel="features D", ylabel="ms, forward + backward")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)


def _dots(axes: Any, rows: list[dict[str, Any]]) -> None:
    bases = {r["ratio_base"] for r in rows}
    base = rows[0]["ratio_base"] if len(bases) == 1 else "the package"
    cases = list(dict.fromkeys(r["case"] for r in rows))
    variants = {k: v for k, v in _by_variant(rows).items() if k not in bases}
    step = 0.7 / len(variants)
    for i, (name, found) in enumerate(variants.items()):
        middle = [r["ratio"] for r in found]
        spread = [
            [r["ratio"] - r["ratio_q1"] for r in found],
            [r["ratio_q3"] - r["ratio"] for r in found],
        ]
        places = [cases.index(r["case"]) + (i - (len(variants) - 1) / 2) * step for r in found]
        (dots, *_) = axes.errorbar(middle, places, xerr=spread, label=name, fmt="o", capsize=2)
        goals = [(r["target"], y) for r, y in zip(found, places, strict=True) if r["target"]]
        if goals:
            axes.plot(*zip(*goals, strict=True), "|", color=dots.get_color(), markersize=14)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"time relative to {base} (bar: to be reached)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="x", alpha=0.3)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def _floors(axes: Any, rows: list[dict[str, Any]]) -> None:
    cases = list(dict.fromkeys(r["case"] for r in rows))
    names = list(dict.fromkeys(_eager(r) for r in rows))
    step = 0.8 / len(names)
    for i, name in enumerate(names):
        color = plt.get_cmap("tab20")(i % 20)
        offset = (i - (len(names) - 1) / 2) * step
        # Stands for the name in the legend, for whichever of the two there is.
        axes.plot([], [], "o", color=color, label=name)
        for r in rows:
            if _eager(r) == name:
                place = cases.index(r["case"]) + offset
                filled = color if r["variant"].endswith(", graph") else "none"
                axes.plot(r["median_s"] * 1e6, place, "o", color=color, markerfacecolor=filled)
                axes.plot(r["floor_s"] * 1e6, place, "|", color="black", markersize=5)
    for place in range(1, len(cases)):
        axes.axhline(place - 0.5, color="black", linewidth=0.3)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="us a step (filled: as a CUDA graph; bar: the floor)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="x", alpha=0.3)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.plot FILE.json FILE.png")
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
