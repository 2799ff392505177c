"""The CUDA kernels and their bindings, compiled by a C++ compiler and run without a GPU.

``tests/host_cuda`` stands in for the CUDA runtime and holds the programs that test the kernels.
Slow are the operators in torch; nightly the sanitizers, and faults put into the kernels to see that
they are found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CSRC, STAND_IN, CACHE = ROOT / "csrc", ROOT / "tests" / "host_cuda", ROOT / "build" / "host_cuda"
PROGRAMS = [path.stem for path in sorted(STAND_IN.glob("test_*.cpp"))]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-missing-field-initializers"]  # they are for nvcc
FLAGS += ["-Werror"] if os.environ.get("CI") else []
SANITIZED = ["-O1", "-g1"]  # -O2 compiles twice as long for programs a tenth faster
VARIANTS = {
    "plain": [],
    "address": [*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": [*SANITIZED, "-fsanitize=thread"],
}


LONGEST = 1800  # seconds, on a busy machine


def run(*command, cwd=None):
    """A command's result and all that it said, away from this process's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SNF_EXT", "PYTEST"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept,
        text=True,
        timeout=LONGEST,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command, cwd=None) -> str:
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, result.stdout
    return result.stdout


@functools.cache
def macros() -> str:
    """What the compiler defines, its version among it; empty where there is none."""
    try:
        return run(*COMPILER, "-dM", "-E", "-x", "c++", os.devnull).stdout
    except OSError:
        return ""


pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or "__GNUC__" not in macros(),
    reason=f"needs the kernels' sources and GCC or Clang (CXX is {COMPILER[0]})",
)


@functools.cache
def headers(csrc: Path) -> bytes:
    """A digest of all that a source may include."""
    paths = [path for folder in (csrc, STAND_IN) for path in folder.rglob("*.*h")]
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths))


def compile_one(source: Path, folder: Path, flags: Sequence[str] = (), csrc: Path = CSRC) -> Path:
    """The source's object in ``folder``, made unless it is there from before."""
    includes = [f"-I{path}" for path in (STAND_IN, csrc / "cuda", csrc)]
    command = [*COMPILER, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256("\n".join([*command, macros()]).encode() + headers(csrc))
    key.update(source.read_bytes())
    made = folder / f"{source.name}-{key.hexdigest()[:16]}.o"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{source.name}-*.o"):
            stale.unlink(missing_ok=True)
        unfinished = folder / f"{made.name}.{os.getpid()}"
        succeed(*command, "-o", unfinished)
        unfinished.rename(made)
    return made


def compile_all(sources: Sequence[Path], folder: Path, flags: Sequence[str] = ()) -> list[Path]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(lambda source: compile_one(source, folder, flags), sources))


def kernels(variant: str) -> list[Path]:
    """Objects of the kernels and of the stand-in."""
    if VARIANTS[variant] and problem(variant):
        pytest.skip(f"no program runs with {VARIANTS[variant]}: {problem(variant)}")
    stand_in = [path for path in STAND_IN.glob("*.cpp") if path.stem not in PROGRAMS]
    return compile_all([*CSRC.glob("cuda/*.cu"), *stand_in], CACHE / variant, VARIANTS[variant])


PROBE = """
#include <sanitizer/tsan_interface.h>
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#error the stand-in would not know of the sanitizer
#endif
int main() {}
"""


@functools.cache
def problem(variant: str) -> str:
    """Why the compiler's sanitizers do not work here; empty where they do."""
    with tempfile.TemporaryDirectory() as scratch:
        source, probe = Path(scratch, "probe.cpp"), Path(scratch, "probe")
        source.write_text(PROBE)
        built = run(*COMPILER, *VARIANTS[variant], source, "-o", probe)
        return built.stdout if built.returncode else run(probe).stdout


def program(name: str, variant: str, folder: Path, objects: Sequence[Path] = ()) -> Path:
    """A test program, with other objects than the kernels' own if any are given."""
    flags = VARIANTS[variant]
    objects = objects or kernels(variant)
    own = compile_one(STAND_IN / f"{name}.cpp", CACHE / variant, flags)
    succeed(*COMPILER, *flags, own, *objects, "-o", folder / name)
    return folder / name


def passes(path: Path, *arguments: str) -> None:
    assert ", ok" in succeed(path, *arguments)


# ---- The programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels(name, tmp_path):
    passes(program(name, "plain", tmp_path))


@pytest.mark.parametrize(
    "name", ["test_conv2d", "test_pointwise", "test_elementwise", "test_rq_spline"]
)
def test_kernels_with_other_numbers(name, tmp_path):
    passes(program(name, "plain", tmp_path), "7")


# What takes minutes under a sanitizer has a short form that runs every kernel.
SHORT = {"test_rq_spline": ("--few",)}


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_kernels_under_sanitizers(variant, tmp_path):
    objects = kernels(variant)  # once, before the programs are built side by side
    with ThreadPoolExecutor() as pool:
        build = functools.partial(program, variant=variant, folder=tmp_path, objects=objects)
        programs = pool.map(build, PROGRAMS)
        list(pool.map(lambda path: passes(path, *SHORT.get(path.name, ())), programs))


LARGE = """
#include <cuda_runtime.h>
struct Large { char bytes[SIZE]; };
void kernel(Large) {}
void start() { cudaLaunchConfig_t config; cudaLaunchKernelEx(&config, kernel, Large{}); }
"""


@pytest.mark.parametrize(("size", "compiles"), [(4096, True), (4097, False)])
def test_kernels_of_too_many_parameters_do_not_compile(size, compiles, tmp_path):
    source = tmp_path / "large.cpp"
    source.write_text(LARGE)
    result = run(*COMPILER, *FLAGS, f"-I{STAND_IN}", f"-DSIZE={size}", "-fsyntax-only", source)
    assert (result.returncode == 0) == compiles, result.stdout
    assert compiles or "a kernel takes 4096 bytes of arguments" in result.stdout


# ---- Faults that must be found -----------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A change of one place in a header of ``csrc/cuda/UNIT.cu``: what the variants say of it."""

    name: str
    unit: str
    there: str
    instead: str
    program: tuple[str, ...]
    found: dict[str, str]


CONV2D = ("test_conv2d", "--few")
RACE = {"plain": "FAILED", "thread": "data race"}
FAULTS = [
    Fault(
        "no barrier between staging weights and using them",
        "conv2d_kernels",
        "weight_pitch, staged);\n      __syncthreads();",
        "weight_pitch, staged);",
        CONV2D,
        RACE,
    ),
    Fault(
        "no barrier between laying down weights and using them",
        "conv2d_kernels",
        "__syncthreads();  // the plane is there, and nobody needs the scratch memory any more\n"
        "    if (!p.laid_down) {",
        "if (!p.laid_down) {",
        CONV2D,
        RACE,
    ),
    Fault(
        "no barrier between column sums and their total",
        "pointwise_kernels",
        "shared[part * kWarp + lane] = sum;\n  __syncthreads();",
        "shared[part * kWarp + lane] = sum;",
        ("test_pointwise",),
        {"plain": "FAILED"},
    ),
    Fault(
        "window off by one",
        "conv2d_kernels",
        "column + at_column - p.kernel.columns / 2 * g.dilation",
        "column + at_column - p.kernel.columns / 2 * g.dilation + 1",
        CONV2D,
        {"plain": "FAILED"},
    ),
    Fault(
        "read past the end",
        "pointwise_kernels",
        "for (int64_t b = threadIdx.x; b < p.rows;",
        "for (int64_t b = threadIdx.x; b <= p.rows;",
        ("test_pointwise",),
        {"address": "heap-buffer-overflow"},
    ),
    Fault(
        "idle threads leave before the barriers",
        "conv2d_kernels",
        "const bool works = thread < p.items * p.splits;",
        "const bool works = thread < p.items * p.splits;\n  if (!works) return;",
        CONV2D,
        {"plain": "divergent barrier"},
    ),
    Fault(
        "no barrier between one anti-diagonal and the next",
        "triangular_conv2d_kernels",
        "__syncthreads();  // these channels are there",
        "// these channels are there",
        ("test_triangular_conv2d",),
        RACE,
    ),
    Fault(
        "a share of the samples too many",
        "elementwise_kernels",
        "share < shares; ++share",
        "share <= shares; ++share",
        ("test_elementwise",),
        {"plain": "FAILED", "address": "heap-buffer-overflow"},
    ),
    Fault(
        "no barrier between the spline's sums over parts and their use",
        "rq_spline_kernels",
        "__syncthreads();  // the sums are there",
        "// the sums are there",
        ("test_rq_spline",),
        RACE,
    ),
    Fault(
        "the gradient of a bin's upper knot one knot too high",
        "rq_spline_kernels",
        "own[at.number * pitch] += high[kind];",
        "own[(at.number + 1) * pitch] += high[kind];",
        ("test_rq_spline",),
        {"plain": "wrote past its shared memory"},
    ),
]


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_found(fault, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    unit = csrc / "cuda" / f"{fault.unit}.cu"
    headers = [path for path in unit.parent.glob("*.cuh") if fault.there in path.read_text()]
    assert len(headers) == 1, "the code has changed: change the fault too"
    (header,) = headers
    assert header.read_text().count(fault.there) == 1, "the code has changed: change the fault too"
    header.write_text(header.read_text().replace(fault.there, fault.instead))
    name, *arguments = fault.program
    for variant, said in fault.found.items():
        right = [path for path in kernels(variant) if not path.name.startswith(f"{unit.name}-")]
        wrong = compile_one(unit, tmp_path / variant, VARIANTS[variant], csrc)
        result = run(program(name, variant, tmp_path, [*right, wrong]), *arguments)
        assert result.returncode != 0
        assert said in result.stdout


# ---- The operators -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the package and its tests, whose operators run the CUDA bindings on CPU tensors."""
    parent = tmp_path_factory.mktemp("bindings")
    folder = parent / "clone"
    ignored = shutil.ignore_patterns("_C*", "_build.json", "__pycache__", "host_cuda", "cpp")
    for name in ("snf_ext", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if (ROOT.parent / "shared").is_dir():
        (parent / "shared").symlink_to(ROOT.parent / "shared")
    # What has no CUDA kernel runs on the CPU's own.
    own = [CSRC / "cpu" / f"{name}.cpp" for name in ("cpu_capability", "plane", "pooled_memory")]
    own += CSRC.glob("cpu/image_network*.cpp")
    sources = {*CSRC.glob("*.cpp"), *CSRC.glob("cuda/*.cpp"), *own}
    macro = {
        "TORCH_EXTENSION_NAME": "_C",
        "TORCH_API_INCLUDE_EXTENSION_H": "1",
        "SNF_VERSION": "host",
        "SNF_CUDA_KEY": "CPU",
    }
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = [f"-D{k}={v}" for k, v in macro.items()] + [f"-isystem{path}" for path in includes]
    objects = compile_all(sorted(sources - {CSRC / "no_cuda.cpp"}), CACHE / "bindings", flags)
    paths = cpp_extension.library_paths()
    links = [f"-L{path}" for path in paths] + [f"-Wl,-rpath,{path}" for path in paths]
    library = folder / "snf_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    succeed(
        *(*COMPILER, "-shared", *objects, *kernels("plain"), "-o", library, *links),
        *("-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"),
    )
    said = succeed(sys.executable, "-c", "import snf_ext; print(snf_ext.build_info())", cwd=folder)
    assert "'version': 'host'" in said
    return folder


OPERATORS = ["ops", "ops_arguments", "elementwise", "spline", "triangular", "parity", "layers"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(OPERATORS, marks=pytest.mark.slow),
        pytest.param(["flow"], marks=pytest.mark.slow),
        pytest.param(["debias"], marks=pytest.mark.nightly),  # many small calls: minutes
    ],
    ids=" ".join,
)
def test_operators(names, clone):
    """Every test of the operators but those of the CPU's own kernels."""
    files = [f"tests/test_{name}.py" for name in names]
    chosen = "not reference and not threads and not pool and not cpu_only"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in succeed(*command, "-k", chosen, *files, cwd=clone)


# What one step starts: kernels, and operators of torch that are more than a view or an allocation.
STEP = """
import collections, ctypes, importlib, json, torch, snf_ext
from torch.profiler import ProfilerActivity, profile

NOTHING = {"as_strided", "empty", "flatten", "narrow", "resolve_conj", "slice", "t", "to",
           "transpose", "view"}
library = ctypes.CDLL(importlib.import_module("snf_ext._C").__file__)
launches = library["_ZN9host_cuda8launchesEv"]
launches.restype = ctypes.POINTER(ctypes.c_int64)

def started(function, *arguments):
    before = launches()[0]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = function(*arguments)
    names = [e.name.removeprefix("aten::") for e in seen.events() if e.name.startswith("aten::")]
    others = collections.Counter(name for name in names if name not in NOTHING)
    return result, {"kernels": launches()[0] - before, **others}

ops, counts = torch.ops.snf_ext, {}
x, w = torch.randn(3, 4, 14, 14), torch.randn(4, 4, 3, 3)
c, shape, wanted = torch.randn(4), (1, 1, False), [True] * 4
for dtype in (torch.float32, torch.bfloat16):
    tensors = [t.to(dtype) for t in (x, w, w, c)]
    (z, g, q, e), counts[f"forward {dtype}"] = started(
        ops.snf_conv2d_forward, *tensors, *shape, True)
    counts[f"backward {dtype}"] = started(
        ops.snf_conv2d_backward, z, g, q, tensors[0], z, e, *tensors[1:], *shape, 1.0, wanted)[1]
x, w, c = torch.randn(3, 20), torch.randn(20, 20), torch.randn(20)
(z, g, q, e), counts["linear forward"] = started(ops.snf_linear_forward, x, w, w, c, True)
counts["linear backward"] = started(
    ops.snf_linear_backward, z, g, q, x, z, e, w, w, c, 1.0, wanted)[1]
counts["linear backward, share 0"] = started(
    ops.snf_linear_backward, z, g, q, x, z, e, w, w, c, 0.0, wanted)[1]
(z, g, _, _), counts["linear forward, no reconstruction"] = started(
    ops.snf_linear_forward, x, w, w, c, False)
counts["linear backward, no reconstruction"] = started(
    ops.snf_linear_backward, z, g, None, x, None, None, w, w, c, 1.0, wanted)[1]
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_what_a_step_starts(clone):
    """Not a copy, a fill or a sum besides the kernels and the linear layer's six products."""
    assert json.loads(succeed(sys.executable, "-c", STEP, cwd=clone).splitlines()[-1]) == {
        "forward torch.float32": {"kernels": 1},
        "backward torch.float32": {"kernels": 2},
        "forward torch.bfloat16": {"kernels": 1},
        "backward torch.bfloat16": {"kernels": 2},
        "linear forward": {"kernels": 1, "mm": 2},
        "linear backward": {"kernels": 1, "mm": 1, "addmm_": 3},
        "linear backward, share 0": {"kernels": 1, "mm": 1, "addmm_": 2},
        "linear forward, no reconstruction": {"kernels": 1, "mm": 1},
        "linear backward, no reconstruction": {"kernels": 1, "mm": 1, "addmm_": 1},
    }
