"""Loads the compiled operators and decides which code runs.

``native`` is the compiled C++ library, ``reference`` the same operators in plain torch.
The choice is one per process (not per thread): the variable ``SNF_EXT_BACKEND`` at import,
:func:`use_backend` afterwards.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import TracebackType
from typing import Any

import torch

from . import func_transforms
from .build_record import other_torch, why_not_loaded
from .version import __version__

BACKENDS = ("native", "reference")

_library: Any = None
_load_error = other_torch(torch.__version__)
if _load_error is None:
    try:
        _library = importlib.import_module("snf_ext._C")  # importing it registers the operators
    except ImportError as error:
        _load_error = why_not_loaded(error, torch.__version__)


def _check(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "native" and _library is None:
        raise RuntimeError(
            f"{argument} is 'native', but the compiled library cannot be loaded ({_load_error}); "
            "build it with: pip install --no-build-isolation ."
        )
    return name


def _choose() -> str:
    requested = os.environ.get("SNF_EXT_BACKEND")
    if requested:
        return _check(requested, "SNF_EXT_BACKEND")
    if _library is not None:
        return "native"
    warnings.warn(
        f"snf_ext runs in plain torch (backend 'reference'): the compiled library cannot be loaded "
        f"({_load_error}). To build it, in a clone: pip install --no-build-isolation . "
        "To keep plain torch without this warning: SNF_EXT_BACKEND=reference",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


_active = _choose()
_native_devices = {"cpu", "meta"}
if _library is not None and _library.build_info()["cuda"]:
    _native_devices.add("cuda")


def backend() -> str:
    """The code that runs now: ``"native"`` or ``"reference"``.

    >>> import snf_ext
    >>> snf_ext.backend() in ("native", "reference")
    True
    """
    return _active


def runs_native(device: torch.device) -> bool:
    """Whether operators on ``device`` go to the compiled library.

    Not inside a transform of ``torch.func``, which cannot see into C++.
    """
    return _active == "native" and device.type in _native_devices and not func_transforms.active()


class use_backend:
    """Choose the backend for the body of a ``with`` statement.

    Args:
        name: ``"native"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is unknown.
        RuntimeError: ``"native"`` is asked for and not built.

    >>> import snf_ext
    >>> with snf_ext.use_backend("reference"):
    ...     snf_ext.backend()
    'reference'
    """

    def __init__(self, name: str) -> None:
        self.name = _check(name, "name")

    def __enter__(self) -> None:
        global _active
        self._previous = _active
        _active = self.name

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _active
        _active = self._previous


def build_info() -> dict[str, Any]:
    """What is built: ``cpp``, ``cuda`` (bools), ``cuda_archs``, ``torch``, ``version``, and more.

    ``torch`` is the version the library was compiled against (the running one where nothing is
    compiled), ``cpu_capability`` the instruction set that the CPU kernels chose, ``error`` why
    the library could not be loaded (None where it was).

    >>> import snf_ext
    >>> {"cpp", "cuda", "cuda_archs", "torch", "version"} <= set(snf_ext.build_info())
    True
    """
    info: dict[str, Any] = {
        "version": __version__,
        "cpp": _library is not None,
        "cuda": False,
        "cuda_archs": [],
        "torch": torch.__version__,
        "cpu_capability": None,
        "error": _load_error,
    }
    if _library is not None:
        info |= _library.build_info()
    return info
