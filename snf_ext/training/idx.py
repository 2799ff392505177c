"""IDX files, the format of MNIST: big-endian header, then unsigned bytes."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from .errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
MAX_BYTES = 2**33  # a header that asks for more is damaged
MAX_RATIO = 1032  # deflate packs a run of equal bytes so far, and nothing further


def read_idx(path: Path, event_shape: tuple[int, ...] = (28, 28)) -> Tensor:
    """Read the images, or with ``event_shape=()`` the labels, of an IDX file, gzipped or not.

    Args:
        path: the file. Whether it is gzipped is told by its first bytes, not by its name.
        event_shape: the shape that each image must have, ``()`` for labels.

    Returns:
        ``(N, *event_shape)``, uint8.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: wrong magic number, dtype, rank or image size; fewer or more bytes than the
            header announces; a damaged gzip stream. The message names the file and the rule.
    """
    path = Path(path)
    if not path.is_file():
        what = "images" if event_shape else "labels"
        raise FileNotFoundError(f"{path} does not exist; an IDX file of {what} must be there")
    with open(path, "rb") as raw:
        zipped = raw.read(2) == GZIP_MAGIC
    opened = gzip.open if zipped else open
    try:
        with opened(path, "rb") as stream:
            most = path.stat().st_size * (MAX_RATIO if zipped else 1)
            return _read(path, cast(BinaryIO, stream), event_shape, most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} must be a whole gzip file; got a damaged one ({error})") from error


def header(content: Tensor) -> bytes:
    """What an IDX file of ``content``, uint8, begins with.

    >>> header(torch.zeros(3, 28, 28, dtype=torch.uint8)).hex()
    '00000803000000030000001c0000001c'
    """
    rank = content.dim()
    return struct.pack(f">HBB{rank}I", 0, UNSIGNED_BYTE, rank, *content.shape)


def _read(path: Path, stream: BinaryIO, event_shape: tuple[int, ...], most: int) -> Tensor:
    """The content of a file that can hold ``most`` bytes: no header makes it take more memory."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise UserError(f"{path} must start with an IDX magic number 0x0000....; got {_hex(magic)}")
    rank, what = 1 + len(event_shape), "images" if event_shape else "labels"
    if magic[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} must hold unsigned bytes (type 0x08); got type {magic[2]:#04x}")
    if magic[3] != rank:
        wanted = "3 dimensions (N, H, W)" if event_shape else "1 dimension (N)"
        raise UserError(f"{path} must have {wanted}; got {magic[3]}")
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise UserError(f"{path} must have a header of {4 + 4 * rank} bytes; got {4 + len(header)}")
    shape = struct.unpack(f">{rank}I", header)
    if shape[1:] != event_shape:
        raise UserError(f"{path} must hold images of {event_shape}; got {shape[1:]}")
    size = torch.Size(shape).numel()
    if size == 0:
        raise UserError(f"{path} must hold at least one {what[:-1]}; got none")
    if size > MAX_BYTES:
        raise UserError(f"{path} must hold at most {MAX_BYTES} bytes; its header says {size}")
    body = bytearray(stream.read(min(size, most)))
    if len(body) < size or stream.read(1):
        extra = "more" if len(body) == size else str(len(body))
        raise UserError(f"{path} must hold {size} bytes of {what}, as its header says; got {extra}")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _hex(data: bytes) -> str:
    return "0x" + data.hex() if data else "an empty file"
