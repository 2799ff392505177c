"""One process at a time in a folder of runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

TAKEN = (errno.EAGAIN, errno.EACCES)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A block in which no other process holds ``folder``, which exists.

    The lock is on the folder itself and is the kernel's: it ends with the process, whatever ends
    that, and leaves no file behind. A file system without locks, such as NFS has of folders, gives
    none, and neither does Windows: there the block just runs.

    Raises:
        UserError: another process holds it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with held(folder), held(folder):
    ...     pass
    Traceback (most recent call last):
        ...
    snf_ext.training.errors.UserError: run folder ... must be of one process at a time; ...
    >>> with held(folder):
    ...     list(folder.iterdir())
    []
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # closed in programs that this one starts
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise UserError(
                    f"run folder {folder} must be of one process at a time; another one runs in it"
                ) from error
        yield
    finally:
        os.close(handle)
