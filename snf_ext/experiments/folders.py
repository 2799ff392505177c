"""The folder of a run: what it is of, and what came out, so that nothing is done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.checkpoint import read_json, write_aside, write_json
from ..training.errors import UserError

SETTINGS, OUTCOME, LAST = "settings.json", "outcome.json", "last.pt"


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
        before = _object(folder / SETTINGS)
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
    if _object(folder / SETTINGS) != _plain(settings):
        return None
    found = _object(folder / OUTCOME)
    rows = found.get("rows")
    of_rows = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
    if not of_rows and not isinstance(found.get("diverged"), str):
        raise UserError(f"{folder / OUTCOME} must have the rows of a run; got another file")
    return found


def adopt(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a new training run with what the same one left under another name, if there is one.

    In another row or experiment of the same results, where the curves of a figure are those of a
    table's rows. The run then goes on from its last checkpoint, at its end.
    """
    if (folder / LAST).is_file():
        return
    wanted = _plain(settings)
    for other in sorted(folder.parents[2].glob(f"*/*/*/{OUTCOME}")):
        source = other.parent
        if (source / LAST).is_file() and read_json(source / SETTINGS) == wanted:
            own = shutil.ignore_patterns(SETTINGS, OUTCOME, LAST)
            shutil.copytree(source, folder, ignore=own, dirs_exist_ok=True)
            with write_aside(folder / LAST) as part:  # the last one: with it there is a run
                shutil.copyfile(source / LAST, part)
            return


def finish(folder: Path, found: Mapping[str, Any]) -> None:
    """Write what came out; from here on the run counts as done."""
    write_json(folder / OUTCOME, found)


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object; got {type(content).__name__}")
    return content


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
