"""From what runs found to a record: mean and deviation over seeds, beside the paper's number."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import Experiment, Measure, Row, reductions, shortened

WITHOUT_MEANING = (
    "These settings are not the paper's: the column *difference* means nothing at this scale, "
    "and is there so that every scale has the same table. Rows are named as in the paper, "
    "whatever is reduced."
)
AS_THE_PAPER = "The paper's settings."


def record(
    name: str,
    experiment: Experiment,
    scale: str,
    seeds: int,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What ``NAME.json`` holds but for the environment.

    Args:
        name: of the experiment.
        experiment: what it is.
        scale: of the runs.
        seeds: how many runs a row shall have.
        runs: by row what each run that is done found, with its seed.
    """
    rows = experiment.rows_of(scale)
    reduced = reductions(rows, scale)
    left_out = [row.name for row in experiment.rows if row not in rows]
    if left_out:
        reduced.append(f"rows left out: {shortened(left_out)}")
    table = [_row(row.at(scale), experiment.measures, runs.get(row.name, ())) for row in rows]
    result: dict[str, Any] = {
        "experiment": name,
        "title": experiment.title,
        "scale": scale,
        "seeds": seeds if experiment.kind.seeded else 1,
        "reductions": reduced,
        "comparable": not reduced,
        "says": AS_THE_PAPER if not reduced else WITHOUT_MEANING,
        "notes": list(experiment.notes),
        "measures": [
            {"key": m.key, "unit": m.unit, "digits": m.digits} for m in experiment.measures
        ],
        "rows": table,
    }
    if experiment.fit:
        result["fits"] = experiment.fit(table)
    return result


def _row(
    row: Row, measures: Sequence[Measure], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "name": row.name,
        "title": row.title,
        "ours": row.ours,
        "settings": row.flat(),
        "diverged": sum("diverged" in run for run in runs),
        "failed": sum("failed" in run for run in runs),
        "epochs": next((run["epochs"] for run in runs if "epochs" in run), None),
        "seconds": _mean([run["seconds"] for run in runs if "seconds" in run]),
        "measures": {m.key: _measured(row, m.key, runs) for m in measures},
        "runs": [dict(run) for run in runs],
    }


def _measured(row: Row, key: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [run[key] for run in runs if run.get(key) is not None]
    mean, paper = _mean(values), row.paper.get(key)
    found: dict[str, Any] = {
        "mean": mean,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "count": len(values),
        "paper": paper.mean if paper else None,
        "paper_std": paper.std if paper else None,
        "paper_diverged": paper is not None and paper.mean is None,
        "difference": None,
    }
    if mean is not None and paper and paper.mean is not None:
        found["difference"] = mean - paper.mean
    for quartile in ("q1", "q3"):  # of times, whose key ends in the unit
        name = f"{key.removesuffix('_ms')}_{quartile}"
        if runs and name in runs[0]:
            found[quartile] = runs[0][name]
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
