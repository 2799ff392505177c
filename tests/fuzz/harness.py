"""What the fuzzers share: a folder to write in, what may be raised, how one is run."""

from __future__ import annotations

import atexit
import inspect
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType

from snf_ext.training.errors import UserError

CORPUS = Path(__file__).resolve().parent / "corpus"
DOCUMENTED = (UserError, FileNotFoundError)
MEMORY = 400e6  # bytes that no input may take: more than all imports that wait for one, and no more

SHM = Path("/dev/shm")  # in memory, where the system has it


@cache
def scratch() -> Path:
    """A folder of this process for the files of every input."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=SHM if SHM.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def chosen(data: bytes, targets: dict[str, Callable[[bytes], None]]) -> None:
    """Give all but the first byte to the target that this one chooses."""
    if not data:
        return
    target = list(targets.values())[data[0] % len(targets)]
    before = peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(*DOCUMENTED):
            target(data[1:])
    taken = peak() - before
    assert taken < MEMORY, f"an input of {len(data)} bytes took {taken / 1e6:.0f} MB"


def peak() -> float:
    """The most memory that this process ever had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_seeds(folder: Path, seeds: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds.items():
        (folder / name).write_bytes(content)


def run(
    one_input: Callable[[bytes], None], seeds: Callable[[], dict[str, bytes]], modules: list[str]
) -> None:
    """Fuzz with libFuzzer's arguments, or write the seeds: ``--seeds FOLDER``.

    Coverage is counted in functions of ``modules``, and of those in them.
    """
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]), seeds())
        return
    import atheris

    for function in _functions(modules):
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


def _functions(modules: list[str]) -> list[FunctionType]:
    found: dict[int, FunctionType] = {}
    for name, module in list(sys.modules.items()):
        if not any(name == wanted or name.startswith(f"{wanted}.") for wanted in modules):
            continue
        for part in vars(module).values():
            parts = vars(part).values() if isinstance(part, type) else [part]
            for function in parts:
                function = inspect.unwrap(getattr(function, "__func__", function))
                if isinstance(function, FunctionType) and function.__module__ == name:
                    found[id(function)] = function
    return list(found.values())
