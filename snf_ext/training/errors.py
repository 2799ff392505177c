"""The errors that a person at the command line can act on."""

from __future__ import annotations

import errno
import importlib
from types import ModuleType
from typing import Any


class UserError(ValueError):
    """A request or a file that cannot be used; the message is one line that says what to do."""


class Diverged(RuntimeError):
    """Training reached a state that it must not go on from.

    Attributes:
        cause: what was found, and in which layer.
        advice: what to change.
        step: the step's number; 0 where there is none.
    """

    def __init__(self, message: str, *, cause: str = "", advice: str = "", step: int = 0) -> None:
        super().__init__(message)
        self.cause, self.advice, self.step = cause or message, advice, step

    def __reduce__(self) -> tuple[Any, ...]:  # to reach other processes
        state = {"cause": self.cause, "advice": self.advice, "step": self.step}
        return type(self), self.args, state


def is_of_the_disk(error: Exception) -> bool:
    """Whether the disk failed: not the content of a file, which may name a place before its begin.

    >>> is_of_the_disk(OSError(errno.EIO, "Input/output error")), is_of_the_disk(ValueError("no"))
    (True, False)
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def require(module: str, extra: str = "train") -> ModuleType:
    """Import a module of an extra.

    Raises:
        UserError: it is not installed; the message has the command that installs it.

    >>> require("math").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise UserError(
            f'{missing} is needed here and not installed: pip install "snf_ext[{extra}]"'
        ) from error
