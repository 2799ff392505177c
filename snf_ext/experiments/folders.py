"""The folder of a run: what it is of, and what came out, so that nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.checkpoint import write_json
from ..training.errors import UserError

SETTINGS, OUTCOME = "settings.json", "outcome.json"


def read_json(path: Path) -> Any:
    """A JSON file of ours.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} must be whole JSON; {error}") from error


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Take ``folder`` for a run with ``settings``: new, or of the same run before.

    Raises:
        UserError: it holds something else, or a run with other settings; the message names the
            first that differs.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _plain(settings)
    if (folder / SETTINGS).is_file():
        before = read_json(folder / SETTINGS)
        for name in [*wanted, *before]:
            if before.get(name) != wanted.get(name):
                raise UserError(
                    f"{name} must stay {before.get(name)!r}, as in {folder}; "
                    f"got {wanted.get(name)!r} (choose another --out, or remove the folder)"
                )
    elif any(path.suffix != ".part" for path in folder.iterdir()):
        raise UserError(f"{folder} must be new, empty or of this experiment; it holds other files")
    else:
        write_json(folder / SETTINGS, wanted)
    for part in folder.glob(".*.part"):  # what SIGKILL in mid-write leaves
        part.unlink()


def outcome(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run with just these settings left in ``folder``; None if it is not done."""
    if not ((folder / SETTINGS).is_file() and (folder / OUTCOME).is_file()):
        return None
    same = read_json(folder / SETTINGS) == _plain(settings)
    return read_json(folder / OUTCOME) if same else None


def finish(folder: Path, found: Mapping[str, Any]) -> None:
    """Write what came out; from here on the run counts as done."""
    write_json(folder / OUTCOME, found)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
