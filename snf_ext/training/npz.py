"""Colour images from an ``.npz`` file."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from .errors import UserError, is_of_the_disk, require

MAX_BYTES = 2**33  # of one array; a header that asks for more is damaged
MAX_RATIO = 1032  # deflate packs a run of equal bytes so far, and nothing further
ENCRYPTED = 0x1  # a flag of a file in a zip archive


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

    A header is believed only as far as the file can hold what it announces, so that reading never
    takes more memory than 1032 times the file's size, the most that deflate packs.

    Raises:
        UserError: it is damaged, of another format, or lacks an array.
    """
    numpy = require("numpy")
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise UserError(f"{path} must be an .npz file of several arrays; got a single one")
    try:
        with ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if missing := [name for name in names if f"{name}.npy" not in members]:
                raise UserError(
                    f"{path} must hold the arrays {', '.join(names)}; it lacks {', '.join(missing)}"
                )
            size = path.stat().st_size
            return {
                name: _array(numpy, archive, members[f"{name}.npy"], size, f"{path}: {name}")
                for name in names
            }
    except UserError:
        raise
    except Exception as error:  # numpy parses a header as Python, and raises what that leads it to
        if is_of_the_disk(error):
            raise
        reason = type(error).__name__
        raise UserError(
            f"{path} must be a whole .npz file of plain arrays; got {reason}"
        ) from error


def _array(numpy: Any, archive: ZipFile, info: ZipInfo, size: int, what: str) -> Any:
    """One array of an archive of ``size`` bytes, after its header was compared with its place."""
    packed = info.compress_type == ZIP_DEFLATED
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or info.flag_bits & ENCRYPTED:
        raise UserError(f"{what} must be stored or deflated, as numpy writes it; got another kind")
    most = min(MAX_BYTES, min(info.compress_size, size) * (MAX_RATIO if packed else 1))
    with archive.open(info) as stream:
        shape, dtype, begins = _header(numpy.lib.format, stream)
        # A product of Python's own numbers, which do not overflow.
        announced = torch.Size(shape).numel() * dtype.itemsize
        if announced > most or begins + announced != info.file_size:
            raise UserError(
                f"{what} must hold the bytes that its header announces; "
                f"got {dtype} of shape {shape} in {info.file_size} bytes"
            )
    with archive.open(info) as stream:
        return numpy.lib.format.read_array(stream, allow_pickle=False)


def _header(form: Any, stream: IO[bytes]) -> tuple[tuple[int, ...], Any, int]:
    """Shape, type and where the values begin."""
    version = form.read_magic(stream)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for named fields
        raise ValueError(f"version {version}")
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("an array of objects")
    return shape, dtype, stream.tell()


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
