"""What times grow with: exponents fitted to a result of ``bench.compare figure4``.

    python -m bench.growth FILE.json

Time against size is a power law where the largest term has won, so a line is fitted to log time
against log size over a stated range, by least squares; its slope is the exponent. The interval
holds the slope with a confidence of 95 % if the points scatter about a line by independent normal
errors: closed form, Student's t with n - 2 degrees of freedom. It says nothing of how well a power
law describes what is outside the range.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SERIES", "Fit", "Series", "fit", "growth", "lines", "main"]

CONFIDENCE = 0.95
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """time ~ x^exponent, with the ends of the exponent's interval."""

    exponent: float
    low: float
    high: float
    points: int


def fit(x: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares of log time on log x.

    Raises:
        ValueError: fewer than three points, sizes all alike, or a number that is not positive.

    >>> square = fit([1, 2, 4, 8], [3, 12, 48, 192])
    >>> round(square.exponent, 6), round(square.high - square.low, 6)
    (2.0, 0.0)
    """
    if len(x) != len(seconds):
        raise ValueError(f"x and seconds must be as many; got {len(x)} and {len(seconds)}")
    if len(x) < 3 or len(set(x)) < 2:
        raise ValueError(f"x must be at least 3 sizes, not all alike; got {list(x)}")
    if min(*x, *seconds) <= 0:
        raise ValueError("x and seconds must be positive")
    from scipy.stats import t as student  # on use: a machine with a GPU may be without

    u, v = [math.log(a) for a in x], [math.log(s) for s in seconds]
    n = len(u)
    mean_u, mean_v = sum(u) / n, sum(v) / n
    square = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / square
    residual = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    deviation = math.sqrt(residual / (n - 2) / square)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, n - 2)) * deviation
    return Fit(slope, slope - reach, slope + reach, n)


@dataclass(frozen=True)
class Series:
    """Rows that differ in one size alone; the fit is over ``first`` to ``last`` of it.

    ``at_most`` and ``at_least`` are exponents to be reached, by variant.
    """

    name: str
    size: str  # "pixels" is height x width
    fixed: Mapping[str, Any]
    first: int
    last: int
    at_most: Mapping[str, float]
    at_least: Mapping[str, float]

    def size_of(self, row: Row) -> int | None:
        """The size of a row of this series; None for others."""
        if any(row.get(key) != value for key, value in self.fixed.items()):
            return None
        pixels = self.size == "pixels"
        size: int = row["height"] * row["width"] if pixels else row[self.size]
        return size


OURS, EXACT = {"native": 2.15}, {"exact": 2.6}
_LAYER = {"channels": 1, "kernel": 3, "batch": 128}
SERIES = (
    Series("D", "features", {"batch": 128, "adam": False}, 800, 4064, OURS, EXACT),
    Series("D, with Adam", "features", {"batch": 128, "adam": True}, 800, 4064, OURS, EXACT),
    Series("batch, D=800", "batch", {"features": 800, "adam": False}, 32, 1024, {}, {}),
    Series("pixels, 1 channel", "pixels", _LAYER, 256, 4096, {}, {}),
    Series(
        "channels, 16x16",
        "channels",
        {"height": 16, "width": 16, "kernel": 3, "batch": 128},
        4,
        32,
        {},
        {},
    ),
)


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record for each series and variant that has three points; see :class:`Fit`."""
    found = []
    for series in SERIES:
        points: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            x = series.size_of(row)
            if x is not None and series.first <= x <= series.last:
                points.setdefault(row["variant"], []).append((x, row["median_s"]))
        for variant, pairs in points.items():
            if len(pairs) >= 3:
                found.append(_record(series, variant, sorted(pairs)))
    return found


def _record(series: Series, variant: str, pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    x, seconds = zip(*pairs, strict=True)
    line = fit(x, seconds)
    at_most, at_least = series.at_most.get(variant), series.at_least.get(variant)
    met = None
    if at_most is not None:
        met = line.exponent <= at_most
    elif at_least is not None:
        met = line.exponent >= at_least
    return {
        "series": series.name,
        "variant": variant,
        "exponent": line.exponent,
        "low": line.low,
        "high": line.high,
        "confidence": CONFIDENCE,
        "points": line.points,
        "first": x[0],
        "last": x[-1],
        "at_most": at_most,
        "at_least": at_least,
        "met": met,
    }


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the records."""
    if not records:
        return ["growth: no series has three points"]
    text = [f"{'growth of the time with':<26}{'variant':<24}{'exponent':>9}  95 %           range"]
    for r in records:
        goal = f"<= {r['at_most']}" if r["at_most"] is not None else f">= {r['at_least']}"
        goal = "" if r["met"] is None else f"  {goal} {'met' if r['met'] else 'NOT MET'}"
        text.append(
            f"{r['series']:<26}{r['variant']:<24}{r['exponent']:>9.2f}  "
            f"[{r['low']:.2f} {r['high']:.2f}]".ljust(76)
            + f"{r['first']}..{r['last']}, {r['points']} points{goal}"
        )
    return text


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m bench.growth FILE.json", file=sys.stderr)
        return 2
    result = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print("\n".join(lines(growth(result["rows"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
