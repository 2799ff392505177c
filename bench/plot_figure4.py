"""The picture of Figure 4: time per batch against the size of one layer, log to log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .growth import SERIES

__all__ = ["COLUMNS", "draw_figure4"]

# What the picture shows, in this order, and how it calls it; the rest is in the table.
COLUMNS = {
    "native": "self-normalizing (native)",
    "exact": "exact",  # of a convolution by blocks of its band
    "exact (dense)": "exact, dense matrix",
    "relative": "relative gradient",
    "composed": "composed, as in the public code",
    "products (out=)": "six bare products",
}
PANELS = (  # title, size on the axis, series without the optimizer, with it
    ("one fully connected layer", "features D", "D", "D, with Adam"),
    ("one 3x3 convolution, 1 channel", "pixels", "pixels, 1 channel", None),
)


def draw_figure4(figure: Any, result: Mapping[str, Any]) -> None:
    """Panels side by side; filled with the optimizer, as in the paper, dashed without."""
    for axes, panel in zip(figure.subplots(1, 2, width_ratios=(3, 2)), PANELS, strict=True):
        _panel(axes, result, *panel)
    figure.axes[0].set_ylabel("ms a batch of 128")


def _panel(
    axes: Any, result: Mapping[str, Any], title: str, label: str, plain: str, adam: str | None
) -> None:
    series = {s.name: s for s in SERIES}
    exponents = {(r["series"], r["variant"]): r["exponent"] for r in result.get("growth", ())}
    whole = adam or plain
    for i, (variant, words) in enumerate(COLUMNS.items()):
        for name in dict.fromkeys((whole, plain)):
            points = sorted(
                (x, r["median_s"] * 1e3)
                for r in result["rows"]
                if r["variant"] == variant and (x := series[name].size_of(r)) is not None
            )
            if not points:
                continue
            main = name == whole
            legend = words if main or variant.startswith("products") else None
            if legend and (name, variant) in exponents:
                legend += f", ~ {label[-1] if adam else 'n'}^{exponents[name, variant]:.2f}"
            style = {"marker": "o", "markersize": 3} if main else {"linestyle": "--", "alpha": 0.5}
            width = 2.2 if variant == "native" else 1.2
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=legend, lw=width, **style)
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_title(f"{title} (dashed: without Adam)" if adam else title, fontsize=9)
    axes.grid(True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
