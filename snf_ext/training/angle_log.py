"""The file of the gradient angles that were measured while training."""

from __future__ import annotations

import csv
from pathlib import Path

from .angle import mean_angle
from .checkpoint import write_aside
from .errors import UserError


class AngleLog:
    """``angles.csv``: one row a measured step, with columns ``step``, ``mean`` and each layer's.

    Degrees; ``nan`` where there was no angle, nothing where a layer was not measured.

    Args:
        path: of the file.
        done: the finished steps of the run that goes on. Rows up to there are kept, later ones,
            of an epoch that will be done again, are not.

    Raises:
        UserError: the file is not one that this class wrote.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "angles.csv"
    >>> log = AngleLog(path)
    >>> for step in (10, 20):
    ...     log.add(step, {"a": 1.0, "b": 2.0})
    >>> log.write()
    >>> AngleLog(path, done=15).rows
    [{'step': '10', 'mean': '1.5', 'a': '1', 'b': '2'}]
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, str]] = []
        if not self.path.exists():
            return
        try:
            with open(self.path, newline="") as file:
                table = csv.DictReader(file, strict=True)
                self.rows = [row for row in table if int(row["step"]) <= done]
                if any(None in row for row in self.rows):
                    raise ValueError("more cells than columns")
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(
                f"{self.path} must have a column step of whole numbers; got another file"
            ) from error

    def add(self, step: int, angles: dict[str, float]) -> None:
        """Append a row; :meth:`write` brings it to the disk."""
        values = {"mean": mean_angle(angles), **angles}
        self.rows.append(
            {"step": str(step)} | {name: f"{value:.7g}" for name, value in values.items()}
        )

    def write(self) -> None:
        """Write the file aside and rename it, if there are rows or an older file."""
        if not self.rows and not self.path.exists():
            return
        # Other layers may be measured by another version, or be too large no longer.
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with write_aside(self.path) as part, open(part, "w", newline="") as file:
            table = csv.DictWriter(file, list(columns) or ["step"], lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
