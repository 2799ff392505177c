"""What an experiment is made of: rows of settings with the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..training.data import Dataset
from ..training.run import BuildFlow

SCALES = ("full", "cpu", "smoke")
"""The paper's setting; what a small CPU does in hours; what it does in a minute."""

Numbers = dict[str, Any]
"""What one run of a row found, plain values for JSON."""


@dataclass(frozen=True)
class Paper:
    """A number of the paper: mean and, where printed, standard deviation; None: it diverged."""

    mean: float | None
    std: float | None = None


@dataclass(frozen=True)
class Measure:
    """A number that rows are compared by: its key in what a run found, its unit, its digits."""

    key: str
    unit: str
    digits: int


@dataclass(frozen=True)
class Row:
    """One line of a table, one curve of a figure.

    Attributes:
        name: of its folder, and for ``--only``.
        title: for readers.
        model: a name in the table of models.
        model_args: for the model, beyond what the data decide.
        data: a name in the table of data sets.
        settings: all else that decides the numbers; for a training run those of
            :class:`~snf_ext.training.config.Config`.
        paper: the paper's numbers by the key of the measure.
        ours: whether the paper has no such row.
        group: rows that are timed together.
        reduced: what a scale changes: a setting, an argument of the model, or ``data``.
    """

    name: str
    title: str
    model: str
    model_args: Mapping[str, Any]
    data: str
    settings: Mapping[str, Any]
    paper: Mapping[str, Paper] = field(default_factory=dict)
    ours: bool = False
    group: str = ""
    reduced: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def at(self, scale: str) -> Row:
        """The row as ``scale`` runs it."""
        settings, model_args, data = dict(self.settings), dict(self.model_args), self.data
        for name, value in self.reduced.get(scale, {}).items():
            if name == "data":
                data = value
            elif name in settings:
                settings[name] = value
            else:
                model_args[name] = value
        return replace(self, settings=settings, model_args=model_args, data=data)

    def flat(self) -> dict[str, Any]:
        """Everything that decides the row's numbers, by name."""
        return {"model": self.model, "data": self.data, **self.model_args, **self.settings}


def reductions(rows: Iterable[Row], scale: str) -> list[str]:
    """What ``scale`` makes of the paper's settings, a sentence for each kind of change.

    >>> row = Row("fc", "FC", "fc", {}, "mnist", {"epochs": 6000}, reduced={"cpu": {"epochs": 10}})
    >>> reductions([row], "cpu"), reductions([row], "full")
    (['epochs: 10 in place of 6000 (fc)'], [])
    """
    changes: dict[str, list[str]] = {}
    for row in rows:
        full, here = row.flat(), row.at(scale).flat()
        for name, value in here.items():
            if name not in full:
                changes.setdefault(f"{name}: {value}", []).append(row.name)
            elif value != full[name]:
                text = f"{name}: {value} in place of {full[name]}"
                changes.setdefault(text, []).append(row.name)
    return [f"{text} ({shortened(names)})" for text, names in changes.items()]


def shortened(names: Sequence[str]) -> str:
    """The first names of many.

    >>> shortened(["a", "b"]), shortened([str(i) for i in range(12)])
    ('a, b', '0, 1, 2, 3, 4, 5, 6, 7 and 4 more')
    """
    more = f" and {len(names) - 8} more" if len(names) > 9 else ""
    return ", ".join(names[:8] if more else names) + more


@dataclass(frozen=True)
class Place:
    """Where runs happen: device, loaded data by name, what builds flows, progress on stderr, and
    whether each training run draws its own pictures."""

    device: torch.device
    data: Mapping[str, Dataset]
    build: BuildFlow
    progress: bool
    pictured: bool = True


@dataclass(frozen=True)
class Unit:
    """What is run, or skipped, as a whole.

    Attributes:
        rows: names of the rows that it is of.
        seed: of the run.
        folder: below that of the experiment.
        settings: what decides its numbers; a folder of others is refused.
        perform: runs it in the folder; the numbers of each row.
    """

    rows: tuple[str, ...]
    seed: int
    folder: str
    settings: Mapping[str, Any]
    perform: Callable[[Path, Place], dict[str, Numbers]]


def runs_of(
    rows: Sequence[Row],
    seeds: int,
    settings: Callable[[Row, int], Mapping[str, Any]],
    perform: Callable[[Row, int, Path, Place], Numbers],
) -> list[Unit]:
    """A unit for each row and seed, in the folder ``ROW/seed-S``."""

    def numbers(row: Row, seed: int, folder: Path, place: Place) -> dict[str, Numbers]:
        return {row.name: perform(row, seed, folder, place)}

    return [
        Unit(
            (row.name,),
            seed,
            f"{row.name}/seed-{seed}",
            settings(row, seed),
            partial(numbers, row, seed),
        )
        for row in rows
        for seed in range(seeds)
    ]


def data_of(rows: Sequence[Row]) -> set[str]:
    """The data sets of the rows."""
    return {row.data for row in rows}


class Kind(Protocol):
    """How the rows of an experiment are run."""

    @property
    def seeded(self) -> bool:
        """Whether it is repeated with several seeds."""
        ...

    def units(self, rows: Sequence[Row], seeds: int) -> list[Unit]:
        """What to run, in order."""
        ...

    def data(self, rows: Sequence[Row]) -> set[str]:
        """The data sets that must be loaded."""
        ...


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        title: what it shows.
        kind: how its rows are run.
        rows: at full scale.
        measures: the numbers of its table.
        draw: makes the picture of a record, given the folder of the runs, into a path.
        notes: what the paper leaves open and we decided.
        only: names of the rows that a scale has; all where a scale is not named.
        fit: numbers over all rows, from the record's rows.
    """

    title: str
    kind: Kind
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...]
    draw: Callable[[dict[str, Any], Path, Path], None]
    notes: tuple[str, ...] = ()
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fit: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def rows_of(self, scale: str) -> list[Row]:
        """The rows that ``scale`` has, at full scale's settings."""
        kept = self.only.get(scale)
        return [row for row in self.rows if kept is None or row.name in kept]
