"""The tables of docs/results.md that come from ``snf-ext reproduce --scale cpu``.

    python -m bench.study bench/results/cpu-study

The folder has the JSON files that the command left, one an experiment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def origin(record: Record) -> str:
    """Where a table comes from, in one sentence."""
    where = record["environment"]
    command = where["command"].split(" --only")[0]
    return (
        f"`{command}`: {where['machine']}, {where['threads']} thread, "
        f"torch {where['torch']}, commit `{where['commit'][:7]}`."
    )


def likelihoods(record: Record) -> str:
    """A line a row: exact test NLL of the best epoch, and what training took."""
    lines = ["| row | test NLL, nats | epochs | seconds of training |", "|---|---|---|---|"]
    lines += [
        f"| {title(row)} | {value(row, 'nll', 1)} | {row['epochs']} | {row['seconds']:.0f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines)


def by_weight(record: Record) -> str:
    """Table 4: a line a model, a column a lambda."""
    models: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        model, _, weight = row["name"].partition("-")
        models.setdefault(model, {})[weight] = value(row, "nll", 1)
    weights = list(dict.fromkeys(weight for cells in models.values() for weight in cells))
    heads = ["by our controller" if weight == "relative" else f"λ = {weight}" for weight in weights]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for model, cells in models.items():
        lines.append(f"| {model} | " + " | ".join(cells.get(w, "") for w in weights) + " |")
    return "\n".join(lines)


def by_epoch(record: Record, column: str, digits: int) -> str:
    """A line an epoch, a column a row's first run."""
    runs = {title(row): row["runs"][0]["history"] for row in record["rows"]}
    lines = ["| epoch | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for place in range(max(len(run["epoch"]) for run in runs.values())):
        cells = [
            f"{run[column][place]:.{digits}f}" if place < len(run[column]) else ""
            for run in runs.values()
        ]
        lines.append(f"| {place} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(record: Record) -> str:
    """Figure 2: how far samples by the two inverses are apart."""
    lines = ["| row | mean squared difference of the samples |", "|---|---|"]
    lines += [
        f"| {title(row)} | {row['measures']['difference']['mean']:.2g} |" for row in record["rows"]
    ]
    return "\n".join(lines)


def title(row: Record) -> str:
    """As the pages of ``reproduce`` name it."""
    return row["title"] + " (ours)" * row["ours"]


def value(row: Record, key: str, digits: int) -> str:
    """Mean, with the deviation where there are several seeds; a dash where all diverged."""
    found = row["measures"][key]
    if found["mean"] is None:
        return "-"
    spread = "" if found["std"] is None else f" ± {found['std']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


TABLES: dict[str, tuple[Callable[[Record], str], ...]] = {
    "table1": (likelihoods,),
    "table4": (by_weight,),
    "table5": (likelihoods,),
    "figure2": (differences,),
    "figure3": (lambda record: by_epoch(record, "angle", 2),),
    "figure5": (lambda record: by_epoch(record, "val_nll", 1),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every table."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    for name, tables in TABLES.items():
        record = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        print(f"## {name}\n{origin(record)}\n")
        for table in tables:
            print(table(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
