"""Colour images from an ``.npz`` file."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from .errors import UserError, require


def find_npz(path: Path) -> Path:
    """``path`` itself; of a folder the one ``.npz`` file in it, or else in ``images`` under it.

    Raises:
        FileNotFoundError: there is no such path.
        UserError: the folder holds none, or several.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; an .npz file of images must be there")
        return path
    found = sorted(path.glob("*.npz")) or sorted(path.glob("images/*.npz"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} must hold one .npz file, or --data-dir name it; got {names}")
    return found[0]


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The named arrays of an ``.npz`` file, as data alone: an array of objects is refused.

    Raises:
        UserError: it is damaged, of another format, or lacks an array.
    """
    numpy = require("numpy")
    damaged = (BadZipFile, zlib.error, EOFError, ValueError, MemoryError, NotImplementedError)
    try:
        file = numpy.load(path, allow_pickle=False)
        if not hasattr(file, "files"):
            raise UserError(f"{path} must be an .npz file of several arrays; got a single one")
        with file:
            if missing := [name for name in names if name not in file.files]:
                raise UserError(
                    f"{path} must hold the arrays {', '.join(names)}; it lacks {', '.join(missing)}"
                )
            return {name: file[name] for name in names}
    except UserError:
        raise
    except damaged as error:
        reason = type(error).__name__
        raise UserError(
            f"{path} must be a whole .npz file of plain arrays; got {reason}"
        ) from error


def images_of(path: Path, name: str, array: Any) -> Tensor:
    """``(N, H, W, C)`` bytes as ``(N, C, H, W)``.

    Raises:
        UserError: another type or rank, no image, or neither 1 nor 3 channels.
    """
    if array.dtype != "uint8" or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise UserError(
            f"{path}: {name} must be uint8 of shape (N, H, W, C) with C 1 or 3 and N at least 1; "
            f"got {array.dtype} of shape {array.shape}"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def labels_of(path: Path, name: str, array: Any, count: int) -> Tensor:
    """Class numbers of ``count`` images, int64.

    Raises:
        UserError: another type or shape.
    """
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise UserError(
            f"{path}: {name} must be integers of shape ({count},), one an image; "
            f"got {array.dtype} of shape {array.shape}"
        )
    return torch.from_numpy(array.astype("int64"))
