"""Prints what is built and what is not: ``python -m snf_ext.info``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from .backend import backend, build_info
from .build_record import read_build_record, release


def _extension_lines(info: dict[str, Any]) -> list[tuple[str, str]]:
    if not info["cpp"]:
        return [
            ("C++ kernels", f"not loaded: {info['error']}"),
            ("", "to build them: pip install --no-build-isolation ."),
        ]
    from . import _C

    return [
        ("C++ kernels", f"built with {info['compiler']}, running {info['cpu_capability']} code"),
        ("threads", f"{_C.parallel_threads()} of torch's {torch.get_num_threads()}"),
    ]


def _cuda_line(info: dict[str, Any]) -> str:
    if info["cuda"]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device here"
        return f"built for {', '.join(info['cuda_archs'])}; {device}"
    if torch.version.cuda is None:
        return f"not built: torch {torch.__version__} has no CUDA"
    return "not built; CUDA tensors run in plain torch"


def _torch_lines(info: dict[str, Any]) -> list[tuple[str, str]]:
    record = read_build_record()
    built = info["torch"] if info["cpp"] else record and record["torch"]
    if not built:
        return [("torch", f"{torch.__version__} running")]
    lines = [("torch", f"{torch.__version__} running, {built} at build")]
    if release(built) != release(torch.__version__):
        lines += [
            ("", f"MISMATCH: built against torch {built}, running torch {torch.__version__};"),
            ("", "build again: pip install --no-build-isolation --force-reinstall --no-deps ."),
        ]
    return lines


def report() -> str:
    """The report as text, a line a fact."""
    info = build_info()
    lines = [
        ("snf_ext", f"{info['version']}, in {Path(__file__).parent}"),
        ("backend", backend()),
        *_extension_lines(info),
        ("CUDA kernels", _cuda_line(info)),
        *_torch_lines(info),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


if __name__ == "__main__":
    print(report())
