"""Where the files of a data set are, in the folder named or in a usual one under it; checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError


def root(data: str, data_dir: Path | None, what: str) -> Path:
    """``data_dir`` if it is a folder; ``what`` it has to be is for the message.

    Raises:
        UserError: none was given.
        FileNotFoundError: there is no such folder.
    """
    if data_dir is None:
        raise UserError(f"--data {data} needs --data-dir: {what}")
    path = Path(data_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; --data-dir must be a folder, {what}")
    return path


def folder_of(path: Path, names: Sequence[str], usual: Sequence[str]) -> Path:
    """The first of ``path`` and the ``usual`` folders under it that holds one of ``names``.

    ``path`` itself where none does: what is missing is then told of there.

    >>> folder_of(Path("data"), ["a.npz"], ["images"])
    PosixPath('data')
    """
    folders = (path, *(path / name for name in usual))
    found = (folder for folder in folders if any((folder / name).is_file() for name in names))
    return next(found, path)


def require_md5(path: Path, content: Sequence[Any], md5: str, data: str) -> None:
    """Check the MD5 of a file's uncompressed ``content``, given as buffers one after another.

    Raises:
        UserError: it is another one.

    Cost: 0.15 s for 100 MB.
    """
    digest = hashlib.md5(usedforsecurity=False)  # against a mix-up, not against malice
    for part in content:
        digest.update(part)
    if digest.hexdigest() != md5:
        raise UserError(
            f"{path} must be a file of {data}: the MD5 of its content, uncompressed, must be "
            f"{md5}; got {digest.hexdigest()} (for other data in the same form: --no-verify)"
        )
