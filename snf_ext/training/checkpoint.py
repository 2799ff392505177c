"""Files that are either whole or not there, and checkpoints made of them.

A checkpoint is a dictionary of tensors, numbers and strings, written by ``torch.save`` and read
with ``weights_only=True``: reading one never runs code from it.

    format, version   what it is
    model             {"name": ..., "settings": {...}}, enough to build the flow again; where its
                      layers have controllers, "controller" with the same two of these
    state             the flow's state_dict
    epoch, val_nll    finished epochs; exact validation NLL in nats
    config            the run's settings
    optimizer, history, best, start      in ``last.pt`` alone: what resuming needs
    guard, rollbacks  there too: start of the divergence guard; see training.rollback

A file from elsewhere may be anything, and what it says of its size is not believed: it is an
archive of stored parts, which takes no more memory than it has bytes, and holds plain data alone.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import nn

from .errors import UserError, is_of_the_disk
from .plain import require_plain

FORMAT, VERSION = "snf_ext checkpoint", 1
COMMON = {"model": dict, "state": dict, "epoch": int, "val_nll": float, "config": dict}
RESUME = {"optimizer": dict, "history": list, "best": dict, "start": dict}
NUMBER = int | float


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, moved over it if the block ends well, else removed.

    The move is atomic, and the bytes are on the disk before it: a reader, a crash or a power cut
    meets the old file or the new one, never a part. The temporary name is fixed, so that one left
    by SIGKILL is overwritten by the next attempt.

    Raises:
        OSError: the disk is full, say; it names ``path``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with write_aside(folder / "a.txt") as part:
    ...     _ = part.write_text("whole")
    >>> [file.name for file in folder.iterdir()], (folder / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # a folder that has become read-only
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside, then rename. A number that is not finite is refused."""
    with write_aside(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file of ours.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be whole JSON; {error}") from error


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint with the parts listed above."""
    with write_aside(path) as part, open(part, "wb") as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
        except RuntimeError as error:
            # torch tells of a full disk as of a wrong position, after what the disk told.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, without running anything that it contains.

    Args:
        path: ``best.pt`` or ``last.pt`` of a run.
        resume: require the parts that resuming needs.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is damaged, holds more than data, is not a checkpoint of this package
            or of a version that it cannot read, or lacks a part.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint must be there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign files, which are refused below
            _require_stored(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it to
        if is_of_the_disk(error):
            raise
        raise UserError(
            f"{path} must be a checkpoint of snf_ext that loads as data alone; "
            f"got a damaged or foreign file ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} must be a checkpoint of snf_ext; got a file of another program")
    require_plain(str(path), content, path.stat().st_size)
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} must be of checkpoint version {VERSION}; got {content.get('version')}"
        )
    for key, kind in (COMMON | (RESUME if resume else {})).items():
        if not isinstance(content.get(key), kind):
            raise _damaged(path, key)
    if not all(isinstance(value, torch.Tensor) for value in content["state"].values()):
        raise _damaged(path, "state")
    if resume:
        _require_resumable(path, content)
    return content


def _require_stored(path: Path) -> None:
    """An archive as torch writes it: not packed, so that it unpacks to no more than it is."""
    with ZipFile(path) as archive:
        members = archive.infolist()
    stored = all(member.compress_type == ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise BadZipFile


def _damaged(path: Path, key: str) -> UserError:
    return UserError(f"{path} must have the part {key!r}; it is missing or damaged")


def _require_resumable(path: Path, content: dict[str, Any]) -> None:
    """The rows that training goes on from have what it reads of them."""
    history = content["history"]
    for row in history:
        if not _is_row(row, {"epoch": int, "step": int, "val_nll": NUMBER, "seconds": NUMBER}):
            raise _damaged(path, "history")
        if not all(value is None or isinstance(value, NUMBER) for value in row.values()):
            raise _damaged(path, "history")
    if not history or history[-1]["epoch"] != content["epoch"]:
        raise _damaged(path, "history")
    if not _is_row(content["best"], {"epoch": int, "val_nll": NUMBER}):
        raise _damaged(path, "best")
    if not _is_row(content["start"], {"test_nll": NUMBER}):
        raise _damaged(path, "start")
    # Checkpoints of earlier versions have no guard.
    guard, rollbacks = content.get("guard", {}), content.get("rollbacks", [])
    if not isinstance(guard, dict) or not _is_row(guard, dict.fromkeys(guard, NUMBER)):
        raise _damaged(path, "guard")
    parts = {"epoch": int, "step": int, "cause": str, "recon_weight": NUMBER}
    if not isinstance(rollbacks, list) or not all(_is_row(row, parts) for row in rollbacks):
        raise _damaged(path, "rollbacks")


def _is_row(row: Any, parts: dict[str, Any]) -> bool:
    """Whether it is a dictionary with these parts of these types, its keys all strings."""
    return (
        isinstance(row, dict)
        and all(isinstance(key, str) for key in row)
        and all(isinstance(row.get(key), kind) for key, kind in parts.items())
    )


def load_weights(flow: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into ``flow``.

    Raises:
        UserError: the names or shapes differ from the flow's.
    """
    try:
        flow.load_state_dict(content["state"])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} must fit the model that it names; {reason}") from error
