"""The tables of docs/performance.md: ``python -m bench.performance FILE.json [FILE.json ...]``.

Of each result of ``bench.compare``: a line a case, with the native step's median in milliseconds,
how much of its floor it reaches, and how many times longer every other way of doing the step takes,
with the quartiles of that ratio. A ratio that was to be reached is followed by what was wanted if
it was missed. Of Figure 4 also the exponents fitted to the times.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["growth_table", "main", "milliseconds", "origin", "table"]

Row = Mapping[str, Any]
Result = Mapping[str, Any]


def origin(result: Result) -> str:
    """Where a result comes from, in one sentence."""
    environment = result["environment"]
    before, after = (result[key]["gflops"] for key in ("noise_before", "noise_after"))
    return (
        f"`{environment['command'].split(' --out')[0]}`: {environment['processor']}, "
        f"{environment['threads']} threads, {environment['cpu_capability']}, torch "
        f"{environment['torch']}, commit `{environment['commit'][:7]}`; a 1024³ product ran at "
        f"{before:.0f} GFLOP/s before and {after:.0f} after."
    )


def table(result: Result, cases: Sequence[str] | None = None) -> str:
    """Markdown, of all cases or of those named."""
    rows = [r for r in result["rows"] if cases is None or r["case"] in cases]
    others = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != "native"))
    lines = [
        "| case | native, ms | of the floor | " + " | ".join(others) + " |",
        "|---" * (len(others) + 3) + "|",
    ]
    for case in dict.fromkeys(r["case"] for r in rows):
        here = {r["variant"]: r for r in rows if r["case"] == case}
        native = here["native"]
        reached = native.get("fraction_of_floor")  # results of before floors have none
        cells = [case, milliseconds(native), "" if reached is None else f"{reached:.2f}"]
        cells += [_cell(here.get(other)) for other in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def milliseconds(row: Row) -> str:
    """A row's median, to three digits."""
    number = row["median_s"] * 1e3
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _cell(row: Row | None) -> str:
    if row is None or row["ratio_base"] != "native":
        return ""
    text = f"{row['ratio']:.2f} [{row['ratio_q1']:.2f} {row['ratio_q3']:.2f}]"
    if row["met"] is not False:
        return text
    return f"{text} **wanted {row['target']:.3g}**" if row["target"] else f"{text} **missed**"


def growth_table(result: Result) -> str:
    """Exponents of native, exact and composed, with their 95 % intervals."""
    variants = ("native", "composed", "exact", "exact (dense)", "relative")
    records = {(r["series"], r["variant"]): r for r in result["growth"]}
    lines = ["| time grows with | range | " + " | ".join(variants) + " |"]
    lines.append("|---" * (len(variants) + 2) + "|")
    for series in dict.fromkeys(r["series"] for r in result["growth"]):
        native = records[series, "native"]
        cells = [series, f"{native['first']} to {native['last']}"]
        for variant in variants:
            r = records.get((series, variant))
            cells.append(
                "" if r is None else f"{r['exponent']:.2f} [{r['low']:.2f} {r['high']:.2f}]"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("usage: python -m bench.performance FILE.json [FILE.json ...]", file=sys.stderr)
        return 2
    for name in arguments:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        print(f"{origin(result)}\n\n{table(result)}\n")
        if result.get("growth"):
            print(f"{growth_table(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
