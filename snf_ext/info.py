"""Prints what is built, what is not, and where it runs: ``python -m snf_ext.info``.

It is what a bug report needs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .backend import backend, build_info
from .build_record import read_build_record, release

PACKAGES = ("numpy", "scipy", "pytorch-ignite", "zuko")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:  # on Linux platform.processor() names the architecture, or nothing
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


def _variables() -> str:
    names = sorted(name for name in os.environ if name.startswith("SNF_EXT_") or name in VARIABLES)
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "none set"


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
        ("packages", ", ".join(f"{name} {_installed(name) or '-'}" for name in PACKAGES)),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("processor", _processor()),
        ("variables", _variables()),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


if __name__ == "__main__":
    print(report())
