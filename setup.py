"""Builds the extension ``snf_ext._C``; everything else about the package is in pyproject.toml.

Switches (environment): FORCE_CUDA=1, SNF_EXT_NO_CUDA=1, TORCH_CUDA_ARCH_LIST and MAX_JOBS as usual;
SNF_EXT_NO_EXT=1 installs pure Python; SNF_EXT_REQUIRE_EXT=1 makes a failed build of the extension
an error, where it is otherwise a warning and a pure-Python install that works.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SETUPTOOLS_MINIMUM, TORCH_MINIMUM = (77, 0), (2, 11)
# Built when CUDA is asked for, no architectures are named, and no GPU is there to tell.
CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0+PTX"
# Commands that need no compiler and no torch, so that metadata and an sdist can be made anywhere.
PLAIN_COMMANDS = {"egg_info", "sdist", "clean", "--version", "--name", "--help", "--help-commands"}


def enabled(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def stop(message: str) -> None:
    sys.exit(f"snf_ext: {message}")


def find_torch() -> Any:
    """The torch that the extension will run with.

    An isolated build (plain ``pip install .``) hides the packages of the environment that pip
    installs into, but the extension only works with that environment's torch; so look there too.
    """
    paths = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    sys.path += [path for path in dict.fromkeys(paths) if path not in sys.path]
    try:
        import torch
    except ImportError as error:
        why = "none is installed" if error.name == "torch" else f"it cannot be imported ({error})"
        stop(
            f"the build needs the torch that it will run with, and {why}; "
            "run: pip install torch && pip install --no-build-isolation ."
        )
    if numbers(torch.__version__) < TORCH_MINIMUM:
        stop(
            f"needs torch >= {'.'.join(map(str, TORCH_MINIMUM))}, and {torch.__version__} is "
            "installed; run: pip install --upgrade torch && pip install --no-build-isolation ."
        )
    return torch


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


def compiler_problem() -> str | None:
    """Why no extension can be compiled here, found by building an empty one."""
    if os.name == "nt":
        return "the extension is not built on Windows yet"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <concepts>\nint probe() { return 0; }\n")
        flags = ["-std=c++20", "-fPIC", "-c", f"-I{sysconfig.get_path('include')}"]
        try:
            subprocess.run(
                [*compiler, *flags, str(source), "-o", str(source.with_suffix(".o"))],
                check=True,
                capture_output=True,
                text=True,
            )
        except OSError:
            return f"no C++ compiler was found ({compiler[0]} does not run)"
        except subprocess.CalledProcessError as error:
            return f"the C++ compiler {compiler[0]} fails: {first_error(error.stderr)}"
    return None


def cuda_architectures(torch: Any) -> str | None:
    """The architectures to build CUDA code for, None where only the CPU code is built."""
    from torch.utils.cpp_extension import CUDA_HOME

    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    present = torch.cuda.is_available()
    if enabled("SNF_EXT_NO_CUDA") or not any(ROOT.glob("csrc/cuda/**/*.cu")):
        return None
    if not (enabled("FORCE_CUDA") or named or (present and CUDA_HOME)):
        return None
    missing = "torch has no CUDA" if torch.version.cuda is None else "nvcc was not found"
    if torch.version.cuda is None or CUDA_HOME is None:
        if enabled("FORCE_CUDA"):
            stop(f"FORCE_CUDA=1, but {missing} (torch {torch.__version__}, CUDA_HOME={CUDA_HOME})")
        print(f"snf_ext: building for the CPU only: {missing}", file=sys.stderr)
        return None
    if named:
        return named.replace(" ", ";")
    if present:
        devices = range(torch.cuda.device_count())
        found = {torch.cuda.get_device_capability(device) for device in devices}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    return CUDA_ARCHS


def extension(torch: Any, version: str) -> setuptools.Extension:
    from torch.utils import cpp_extension

    archs = cuda_architectures(torch)
    patterns = ["csrc/*.cpp", "csrc/cpu/**/*.cpp"]
    macros: list[tuple[str, str | None]] = [("SNF_VERSION", version)]
    cxx = ["-O3", "-std=c++20", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    cxx += ["-fno-math-errno", "-fno-trapping-math"]
    # System includes, so that the warnings left are our own.
    cxx += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # OpenMP at compile time only: at::parallel_for is inlined, and the runtime that its calls find
    # is then the one inside torch. Linking another would give two thread pools that fight for the
    # cores. Clang calls an OpenMP runtime that torch does not carry, so there the loops are serial.
    if cpp_extension.check_compiler_is_gcc(cpp_extension.get_cxx_compiler()):
        cxx.append("-fopenmp")
    make = cpp_extension.CppExtension
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        patterns += ["csrc/cuda/**/*.cpp", "csrc/cuda/**/*.cu"]
        macros += [("SNF_WITH_CUDA", None), ("SNF_CUDA_ARCHS", archs.replace(";", ":"))]
        make = cpp_extension.CUDAExtension
    sources = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    return make(
        "snf_ext._C",
        sorted(str(path) for path in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20"]},
    )


def write_record(package: Path, reason: str | None, torch: str | None = None) -> None:
    """Leave in the package what was built, for the messages at import and of snf_ext.info."""
    if reason:
        for stale in package.glob("_C*.so"):
            stale.unlink()
        print(f"snf_ext: WARNING: pure-Python install, {reason}", file=sys.stderr)
    record = {"reason": reason, "torch": torch}
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def package_folder(build: Any, in_place: bool) -> Path:
    return (ROOT if in_place else Path(build.build_lib)) / "snf_ext"


def plan(version: str) -> dict[str, Any]:
    """Arguments of ``setup`` that decide what is compiled."""
    reason = "SNF_EXT_NO_EXT=1 was set" if enabled("SNF_EXT_NO_EXT") else None
    torch = None if reason else find_torch()
    if numbers(setuptools.__version__) < SETUPTOOLS_MINIMUM:
        stop(
            f"setuptools {setuptools.__version__} is too old; run: pip install -U setuptools ninja"
        )
    reason = reason or compiler_problem()
    if reason and enabled("SNF_EXT_REQUIRE_EXT"):
        stop(f"SNF_EXT_REQUIRE_EXT=1, but {reason}")

    class BuildPure(build_py):
        def run(self) -> None:
            super().run()
            write_record(package_folder(self, self.editable_mode), reason)

    if reason:
        return {"cmdclass": {"build_py": BuildPure}}

    from torch.utils.cpp_extension import BuildExtension

    class BuildOrFallBack(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # One folder for wheel, editable and in-place builds: ninja then compiles only changes.
            self.build_temp = f"build/objects-{sys.implementation.cache_tag}-{torch.__version__}"

        def run(self) -> None:
            failure = None
            try:
                super().run()
            except Exception as error:
                if enabled("SNF_EXT_REQUIRE_EXT"):
                    raise
                failure = f"compiling the extension failed ({error}); pip install -v shows how"
                self.extensions = []
            folder = package_folder(self, bool(self.inplace))
            write_record(folder, failure, torch.__version__)

    return {"ext_modules": [extension(torch, version)], "cmdclass": {"build_ext": BuildOrFallBack}}


version = re.search(r'__version__ = "(.+)"', (ROOT / "snf_ext/version.py").read_text())[1]
setuptools.setup(**({} if PLAIN_COMMANDS & set(sys.argv) else plan(version)))
