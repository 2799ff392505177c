"""Runs what an experiment still lacks, and writes what there is after every run."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..training import data as data_sets
from ..training.errors import Diverged, UserError
from ..training.lock import held
from ..training.run import BuildFlow, Interrupted
from . import folders, report, summary
from .plan import SCALES, Experiment, Place, Unit

CPU = torch.device("cpu")
REDRAWN = 30.0  # seconds between pictures: one costs as much as a small run


class Failed(RuntimeError):
    """Runs broke, neither by their settings nor by divergence; the others are done."""


@dataclass(frozen=True)
class Request:
    """What ``snf-ext reproduce`` was asked for.

    Attributes:
        name: of the experiment.
        scale: one of ``SCALES``.
        seeds: runs a row.
        out: folder of results; runs are in ``out/NAME``.
        data_dir: where data sets find their files.
        only: names of rows to run; all if empty.
        device: where to run.
        progress: show it on stderr.
    """

    name: str
    scale: str
    seeds: int
    out: Path
    data_dir: Path | None = None
    only: tuple[str, ...] = ()
    device: torch.device = CPU
    progress: bool = True

    @property
    def command(self) -> str:
        """As it is typed, without the paths."""
        only = f" --only {' '.join(self.only)}" if self.only else ""
        return f"snf-ext reproduce {self.name} --scale {self.scale} --seeds {self.seeds}{only}"


def reproduce(
    request: Request, experiments: Mapping[str, Experiment], build: BuildFlow
) -> dict[str, Any]:
    """Run the rows that are not done, and write ``NAME.json``, ``.md`` and ``.png``.

    Every run has a folder ``out/NAME/ROW/seed-S``. One that is done with the same settings, or
    that diverged with them, is not done again; one that was cut off goes on from its last
    checkpoint.

    Args:
        request: what to run.
        experiments: by name.
        build: makes a flow from the ``model`` part of a checkpoint.

    Returns:
        The record that ``NAME.json`` holds.

    Raises:
        UserError: the request cannot be used, a run's folder is of other settings, or another
            process runs this experiment there.
        FileNotFoundError: a data set is missing; nothing was run.
        Interrupted: by a signal; the same command goes on.
        Failed: runs broke; their messages are in the record, and the same command tries again.
    """
    experiment = _checked(request, experiments)
    rows = [row.at(request.scale) for row in experiment.rows_of(request.scale)]
    units = experiment.kind.units(rows, request.seeds)
    asked = [u for u in units if not request.only or set(u.rows) & set(request.only)]
    folder = request.out / request.name
    names = sorted(experiment.kind.data([r for r in rows if any(r.name in u.rows for u in asked)]))
    loaded = {name: data_sets.load(name, request.data_dir) for name in names}
    pictured = request.scale != "smoke"  # there they would take longer than training
    place = Place(request.device, loaded, build, request.progress, pictured)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        return _reproduce(request, experiment, units, asked, folder, place)


def _reproduce(
    request: Request,
    experiment: Experiment,
    units: Sequence[Unit],
    asked: Sequence[Unit],
    folder: Path,
    place: Place,
) -> dict[str, Any]:
    for unit in asked:
        folders.claim(folder / unit.folder, unit.settings)
    record = _record(request, experiment, units, folder, {})
    _announce(record)
    broken: dict[str, str] = {}
    drawn = -math.inf
    for unit in asked:
        target = folder / unit.folder
        done = folders.outcome(target, unit.settings)
        if done is None:
            done = _run(request, unit, target, place, broken)
            record = _record(request, experiment, units, folder, broken)
            report.write(record, request.out)
            if time.monotonic() - drawn > REDRAWN:
                _draw(record, experiment, folder, request.out)
                drawn = time.monotonic()
        _tell(unit, done, experiment)
    record = _record(request, experiment, units, folder, broken)
    report.write(record, request.out)
    _draw(record, experiment, folder, request.out)
    if broken:
        where, message = next(iter(broken.items()))
        raise Failed(f"{len(broken)} runs failed, the first in {folder / where}: {message}")
    return record


def _checked(request: Request, experiments: Mapping[str, Experiment]) -> Experiment:
    if request.name not in experiments:
        raise UserError(f"name must be one of {', '.join(experiments)}; got {request.name!r}")
    if request.scale not in SCALES:
        raise UserError(f"scale must be one of {', '.join(SCALES)}; got {request.scale!r}")
    if request.seeds < 1:
        raise UserError(f"seeds must be at least 1; got {request.seeds}")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # they would share the folders
        raise UserError(f"reproduce must run in one process; torchrun started {processes}")
    experiment = experiments[request.name]
    known = [row.name for row in experiment.rows_of(request.scale)]
    for name in request.only:
        if name not in known:
            raise UserError(f"only must name rows, {', '.join(known)}; got {name!r}")
    return experiment


def _run(
    request: Request, unit: Unit, target: Path, place: Place, broken: dict[str, str]
) -> dict[str, Any]:
    """Run one; its outcome, which is also written unless it broke."""
    try:
        found: dict[str, Any] = {"rows": unit.perform(target, place)}
    except Interrupted as stop:
        raise Interrupted(
            stop.number, f"stopped in {target}; the same command goes on from there"
        ) from stop
    except Diverged as failure:
        found = {"diverged": str(failure)}
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # out of memory, say: the other runs go on
        traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        broken[unit.folder] = message
        return {"failed": message}
    found["where"] = {
        "device": str(request.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    folders.finish(target, found)
    return found


def _record(
    request: Request,
    experiment: Experiment,
    units: Sequence[Unit],
    folder: Path,
    broken: Mapping[str, str],
) -> dict[str, Any]:
    """Of all runs that are done, also those that were not asked for this time."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        found = folders.outcome(folder / unit.folder, unit.settings)
        if found is None and unit.folder not in broken:
            continue
        found = found or {"failed": broken[unit.folder]}
        for row in unit.rows:
            numbers = found["rows"][row] if "rows" in found else found
            runs.setdefault(row, []).append({"seed": unit.seed, **numbers})
    content = summary.record(request.name, experiment, request.scale, request.seeds, runs)
    where = {"environment": report.environment(request.command, request.device)}
    return {**content, **where}


def _draw(record: dict[str, Any], experiment: Experiment, folder: Path, out: Path) -> None:
    if any(row["runs"] for row in record["rows"]):
        experiment.draw(record, folder, out / f"{record['experiment']}.png")


def _announce(record: Mapping[str, Any]) -> None:
    print(f"{record['title']}, scale {record['scale']}. {record['says']}")
    for text in record["reductions"]:
        print(f"  reduced: {text}")
    sys.stdout.flush()


def _tell(unit: Unit, done: Mapping[str, Any], experiment: Experiment) -> None:
    for name in unit.rows:
        if "rows" not in done:
            said = f"diverged: {done['diverged']}" if "diverged" in done else done["failed"]
        else:
            numbers = done["rows"][name]
            said = ", ".join(_said(numbers.get(m.key), m.unit) for m in experiment.measures)
        print(f"{name}, seed {unit.seed}: {said}", flush=True)


def _said(value: float | None, unit: str) -> str:
    return f"{unit} {'-' if value is None or not math.isfinite(value) else format(value, '.6g')}"
