"""The CPU's kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

``tests/sanitized/kernels.cpp`` runs them without torch, whose thread pool ThreadSanitizer knows
nothing of. What surrounds them in torch is tested as it is.
"""

from __future__ import annotations

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_cuda_on_host import COMPILER, CSRC, VARIANTS, macros, problem, run, succeed

import snf_ext

PROGRAM = Path(__file__).parent / "sanitized" / "kernels.cpp"
FAMILIES = ("conv2d", "elementwise", "rq_spline", "image_network")
pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or "__GNUC__" not in macros(), reason="needs the sources and GCC or Clang"
)


def build(variant: str, isa: str, folder: Path, csrc: Path = CSRC) -> Path:
    """The program for one instruction set."""
    if problem(variant):
        pytest.skip(f"no program runs with {VARIANTS[variant]}: {problem(variant)}")
    flags = ["-std=c++20", "-Wno-psabi", *VARIANTS[variant], f"-DISA={isa}", f"-I{csrc}"]
    sources = [PROGRAM, csrc / "cpu" / "plane.cpp"]
    sources += [csrc / "cpu" / f"{family}_{isa}.cpp" for family in FAMILIES]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source, made):
        succeed(*COMPILER, *flags, "-c", source, "-o", made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(compile_one, sources, objects))
    succeed(*COMPILER, *flags, *objects, "-pthread", "-o", folder / "kernels")
    return folder / "kernels"


def best() -> str:
    return snf_ext.build_info()["cpu_capability"] or "baseline"


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("address", marks=pytest.mark.slow),
        pytest.param("thread", marks=pytest.mark.nightly),
    ],
)
def test_kernels(variant, tmp_path):
    assert ", ok" in succeed(build(variant, best(), tmp_path))


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="has no other instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_kernels_of_slower_processors(isa, tmp_path):
    if isa == best():
        pytest.skip("tested already")
    assert ", ok" in succeed(build("address", isa, tmp_path))


FAULTS = {
    "past a plane's last pixel": (
        *("address", "cpu/conv2d_pixels.inl"),
        "if (t + run > plane.length) t = plane.length - run;",
        "",
        "AddressSanitizer",
    ),
    "scratch memory that threads share": (
        *("thread", "cpu/plane.cpp"),
        "thread_local Buffer buffer;",
        "static Buffer buffer;",
        "data race",
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")  # of thousands
    variant, file, there, instead, said = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(there) == 1, "the code has changed: change the fault too"
    (csrc / file).write_text(text.replace(there, instead))
    result = run(build(variant, best(), tmp_path, csrc))
    assert result.returncode != 0
    assert said in result.stdout
