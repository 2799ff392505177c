"""A disk that can be filled: a small one of its own, or a limit on the size of files."""

from __future__ import annotations

import resource
import subprocess
from contextlib import contextmanager

import pytest

SIZE = 2**20  # of the small disk


class Limited:
    """No file grows beyond ``size``; the error is another one, and it comes in the same places."""

    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def full(self, size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Small:
    """A disk in memory, of which all but ``size`` is taken."""

    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def full(self, size):
        ballast = self.folder / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - size))
        try:
            yield
        finally:
            ballast.unlink()


def mounted(folder, *options):
    """Mount on ``folder`` for the test; a skip where this user may not."""
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.strip()}")


def unmounted(folder):
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["a full disk", "a limit on files"])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a limit on files":
        yield Limited(folder)
        return
    mounted(folder, "-t", "tmpfs", "-o", f"size={SIZE}", "none")
    try:
        yield Small(folder)
    finally:
        unmounted(folder)
