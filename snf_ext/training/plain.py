"""Whether what a file gave is plain data, and no larger than the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UserError

DEPTH = 32
WHOLE = 2**63  # numbers are below; longer ones cannot even be printed


def require_plain(what: str, content: Any, size: int) -> None:
    """Require tensors, numbers, strings, and dictionaries and lists of them.

    A file can name one list many times, and that list another: small to store, endless to go
    through. It can also say that a tensor is larger than the bytes that it has. So no more parts
    are allowed than the file has bytes, and no more bytes of tensors.

    Args:
        what: the file, for messages.
        content: what was read from it.
        size: bytes of the file.

    Raises:
        UserError: another type; a tensor that is not dense; a number of more than 64 bits; more
            than 32 levels; more than fits the file.

    >>> require_plain("a.pt", {"weight": torch.zeros(2), "epoch": 3}, size=100)
    >>> endless = []
    >>> endless.append(endless)
    >>> require_plain("a.pt", endless, size=100)
    Traceback (most recent call last):
        ...
    snf_ext.training.errors.UserError: a.pt must have at most 32 levels of lists; got more
    """
    ahead, seen, left = [(content, 0)], 0, size
    known: set[int] = set()  # storages, of which tensors may be parts
    while ahead:
        value, depth = ahead.pop()
        seen += 1
        if depth > DEPTH:
            raise UserError(f"{what} must have at most {DEPTH} levels of lists; got more")
        if seen > size:
            raise UserError(f"{what} must hold each of its parts; got more than it has bytes")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise UserError(f"{what} must hold dense tensors; got {value.layout}")
            storage = value.untyped_storage()
            left -= 0 if storage.data_ptr() in known else storage.nbytes()
            known.add(storage.data_ptr())
            if left < 0:
                raise UserError(f"{what} must hold all bytes of its tensors; got larger ones")
        elif isinstance(value, dict):
            ahead += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            ahead += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and not -WHOLE <= value < WHOLE:
            raise UserError(f"{what} must hold numbers of at most 64 bits; got a longer one")
        elif not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            raise UserError(f"{what} must hold tensors, numbers and strings; got {kind}")
