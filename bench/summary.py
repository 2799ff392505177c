"""The short table at the end of ``bench/gpu.sh``: ``python -m bench.summary FOLDER``.

One line a native step of each ``*-cuda.json`` in the folder, from those that were timed as a CUDA
graph: microseconds, the floor and how much of it is reached, how many times longer the eager
composition and the better of the two compiled graphs take, and whether every target of the line
is met.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["lines", "table"]

Row = Mapping[str, Any]
GRAPH = ", graph"
HEADER: tuple[str, ...] = (
    "case",
    "eager us",
    "graph us",
    "floor us",
    "reached",
    "composed",
    "compiled",
    "targets",
)


def lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The cells of one suite's lines; "-" where something was not timed or has no target."""
    for case in dict.fromkeys(r["case"] for r in rows):
        here = {r["variant"]: r for r in rows if r["case"] == case}
        for name, row in here.items():
            if name.startswith("native") and not name.endswith(GRAPH):
                yield _line(case, name, row, here.get(name + GRAPH), here)


def _line(
    case: str, name: str, eager: Row, graph: Row | None, here: Mapping[str, Row]
) -> tuple[str, ...]:
    step = f"{case}{name.removeprefix('native')}"
    best = graph or eager
    # The others stand beside the step that their ratios and targets refer to; native steps are
    # judged on lines of their own.
    others = [
        r
        for other, r in here.items()
        if r["ratio_base"] == best["variant"] and not other.startswith("native")
    ]
    composed = [r for r in others if r["variant"].startswith("composed")][:1]
    compiled = [r for r in others if r["variant"].startswith("compiled") and _is_graph(r)]
    return (
        step,
        f"{eager['median_s'] * 1e6:.1f}",
        "-" if graph is None else f"{graph['median_s'] * 1e6:.1f}",
        f"{best['floor_s'] * 1e6:.1f}",
        f"{best['fraction_of_floor']:.2f}",
        _ratio(composed),
        _ratio(compiled),
        _verdict([r for r in (best, *others) if r["met"] is not None]),
    )


def _is_graph(row: Row) -> bool:
    return row["variant"].endswith((GRAPH, "reduce-overhead"))


def _ratio(rows: Sequence[Row]) -> str:
    return f"{min(r['ratio'] for r in rows):.2f}" if rows else "-"


def _verdict(judged: Sequence[Row]) -> str:
    missed = [r for r in judged if not r["met"]]
    if not judged:
        return "-"
    return "met" if not missed else "MISSED: " + "; ".join(_missed(r) for r in missed)


def _missed(row: Row) -> str:
    if row["limit_s"] is not None:
        return f"over {row['limit_s'] * 1e6:g} us"
    return f"{row['variant']} {row['ratio']:.2f} < {row['target']:g}"


def table(folder: Path) -> str:
    """The table of a folder's results, and what the runs had to say of failures."""
    cells, text = [HEADER], []
    for path in sorted(folder.glob("*-cuda.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        cells += lines(result["rows"])
        text += [f"{path.name}: {problem}" for problem in result.get("problems", ())]
        if result["noise_after"] is None:
            text.append(f"{path.name}: cut short, {len(result['rows'])} rows")
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER) - 1)]
    for first, *middle, last in cells:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=True)]
        text.append("  ".join([*line, last]))
    return "\n".join(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.summary FOLDER")
    print(table(Path(sys.argv[1])))
