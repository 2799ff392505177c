"""Whether the package has become slower beside its baselines, from two results of one suite.

    python -m bench.guard BASELINE.json NEW.json [--tolerance 0.15]

Compared are ratios, time(variant) / time(native), not times: a busy day makes both slow. A ratio
has got worse if it is smaller by more than the tolerance, and that beyond the quartiles of both
runs: if the third quartile of the new ratios is under (1 - tolerance) times the first quartile of
the old. The exit status is 1 where one has, and 2 where the files cannot be compared: other suites,
machines, numbers of threads, or a ratio to something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Change", "changes", "check_comparable", "main", "table"]

Result = Mapping[str, Any]
MACHINE = ("processor", "cpu_capability", "threads", "device", "gpu")


@dataclass(frozen=True)
class Change:
    """Quartiles of one ratio, before and now."""

    case: str
    variant: str
    before: tuple[float, float, float]
    now: tuple[float, float, float]
    tolerance: float

    @property
    def relative(self) -> float:
        return self.now[1] / self.before[1] - 1

    @property
    def worse(self) -> bool:
        return self.now[2] < (1 - self.tolerance) * self.before[0]

    @property
    def better(self) -> bool:
        return (1 - self.tolerance) * self.now[0] > self.before[2]


def check_comparable(before: Result, now: Result) -> None:
    """Raises ValueError where the ratios of two results say nothing of each other."""
    for name, result in (("baseline", before), ("new", now)):
        rows = result.get("rows")
        if not rows or "ratio_q1" not in rows[0]:
            raise ValueError(f"{name} must be a result of bench.compare; it has no ratios")
    if before["suite"] != now["suite"]:
        raise ValueError(f"new must be of suite {before['suite']!r}; got {now['suite']!r}")
    for key in MACHINE:
        old, new = (result["environment"].get(key) for result in (before, now))
        if old != new:
            raise ValueError(f"new must be of a machine with {key} {old!r}; got {new!r}")


def changes(before: Result, now: Result, tolerance: float) -> list[Change]:
    """Every ratio that both results have, in the order of the baseline.

    Raises:
        ValueError: the results cannot be compared, or have no row in common.
    """
    check_comparable(before, now)
    rows = {(r["case"], r["variant"]): r for r in now["rows"]}
    found = []
    for old in before["rows"]:
        new = rows.get((old["case"], old["variant"]))
        if new is None:
            continue
        if old["ratio_base"] != new["ratio_base"]:
            raise ValueError(
                f"new must have ratios to {old['ratio_base']!r} at {old['case']}; "
                f"got {new['ratio_base']!r}"
            )
        if old["variant"] != old["ratio_base"]:
            ratios = (_quartiles(old), _quartiles(new))
            found.append(Change(old["case"], old["variant"], *ratios, tolerance))
    if not found:
        raise ValueError("new must have a row of the baseline; it has none")
    return found


def _quartiles(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["ratio_q1"], row["ratio"], row["ratio_q3"]


def table(found: Sequence[Change]) -> str:
    """A line a ratio."""
    width = max(len(f"{c.case}: {c.variant}") for c in found) + 2
    lines = [f"{'':<{width}}{'baseline [quartiles]':<24}{'new [quartiles]':<24}{'change':>8}"]
    for c in found:
        cells = [f"{m:.2f} [{low:.2f} {high:.2f}]" for low, m, high in (c.before, c.now)]
        verdict = "WORSE" if c.worse else "better" if c.better else ""
        name = f"{c.case}: {c.variant}"
        line = f"{name:<{width}}{cells[0]:<24}{cells[1]:<24}{c.relative:>+8.0%}  {verdict}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description="Compares the ratios of two results."
    )
    parser.add_argument("baseline", type=Path, metavar="BASELINE.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=float, default=0.15, help="default 0.15")
    args = parser.parse_args(arguments)
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance must be in [0, 1); got {args.tolerance}")
    try:
        before, now = (_read(path) for path in (args.baseline, args.new))
        found = changes(before, now, args.tolerance)
    except (OSError, ValueError) as error:
        print(f"bench.guard: {error}", file=sys.stderr)
        return 2
    print(table(found))
    _print_notes(before, now)
    worse = [c for c in found if c.worse]
    print(f"{len(worse)} of {len(found)} ratios worse by more than {args.tolerance:.0%}")
    return 1 if worse else 0


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON; {error}") from error
    return result


def _print_notes(before: Result, now: Result) -> None:
    """What may explain a change, and what is not compared."""
    for key in ("torch", "commit"):
        old, new = (result["environment"].get(key) for result in (before, now))
        if old != new:
            print(f"{key}: {old}, now {new}")
    names = {(r["case"], r["variant"]) for r in now["rows"]}
    missing = [r for r in before["rows"] if (r["case"], r["variant"]) not in names]
    if missing:
        print(
            f"{len(missing)} of {len(before['rows'])} rows of the baseline are not in the new run"
        )


if __name__ == "__main__":
    sys.exit(main())
