"""Rows that are training runs, each in a folder as ``snf-ext train`` makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import run
from ..training.checkpoint import read_json
from ..training.config import Config
from ..training.data import Dataset
from .folders import LAST, adopt
from .plan import Numbers, Place, Row, Unit, data_of, runs_of

Extra = Callable[[Path, dict[str, Any], Dataset, int, Place], Numbers]


@dataclass(frozen=True)
class Trained:
    """Runs of the training loop; the numbers are those of the best epoch on the test images.

    Args:
        history: columns of the history that are kept with the numbers.
        extra: further numbers, from the folder, the model, the data and the seed.
    """

    history: tuple[str, ...] = ()
    extra: Extra | None = None
    seeded: bool = True

    def data(self, rows: Sequence[Row]) -> set[str]:
        """The data sets of the rows."""
        return data_of(rows)

    def units(self, rows: Sequence[Row], seeds: int) -> list[Unit]:
        """One run a row and seed."""
        return runs_of(rows, seeds, lambda row, seed: config_of(row, seed).to_dict(), self._perform)

    def _perform(self, row: Row, seed: int, folder: Path, place: Place) -> Numbers:
        config = config_of(row, seed)
        data = place.data[row.data].limit_train(config.limit_train)
        model = run.model_of(config, data)
        adopt(folder, config.to_dict())
        # Before its first checkpoint a run has nothing to go on from, and starts again.
        last = run.open_folder(folder)[1] if (folder / LAST).is_file() else None
        result = run.train(
            config,
            data,
            model,
            place.build,
            folder,
            last,
            place.device,
            place.progress,
            pictured=place.pictured,
        )
        numbers: Numbers = {
            "nll": result["test"]["nll"],
            "bits_per_dim": result["test"]["bits_per_dim"],
            "nll_error": result["test"]["nll_error"],
            "start_nll": result["start_test_nll"],
            "reconstruction": result["test"]["reconstruction"],
            "angle": result["angle"],
            "epochs": result["epochs"],
            "best_epoch": result["best_epoch"],
            "seconds": result["seconds"],
        }
        if self.history:
            history = read_json(folder / "history.json")
            numbers["history"] = {
                name: [entry.get(name) for entry in history] for name in self.history
            }
        if self.extra:
            numbers |= self.extra(folder, model, data, seed, place)
        return numbers


def config_of(row: Row, seed: int) -> Config:
    """The settings of a row's run."""
    return Config(
        model=row.model,
        data=row.data,
        model_args=dict(row.model_args),
        seed=seed,
        **{"angle_every": 0, **row.settings},
    )
