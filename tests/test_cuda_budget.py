"""The budget of the CUDA kernels: what the check reads, what it lets pass, what it stops."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "cuda_budget.py"
if not SCRIPT.exists():
    pytest.skip("needs a clone", allow_module_level=True)

spec = importlib.util.spec_from_file_location("cuda_budget", SCRIPT)
cuda_budget = sys.modules["cuda_budget"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_budget)
Usage = cuda_budget.Usage

needs_demangler = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")

LOG = """\
Cuda compilation tools, release 13.0, V13.0.88
[14/17] nvcc -c kernels.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3snf5sharpIfLi3EEEvPT_' for 'sm_100'
ptxas info    : Function properties for _ZN3snf5sharpIfLi3EEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 36 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 1.1 ms
ptxas info    : Compiling entry function '_ZN3snf5sharpIfLi3EEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN3snf5sharpIfLi3EEEvPT_
    40 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 40 bytes cumulative stack size, 528 bytes smem
ptxas info    : Function properties for _ZN3snf7calleesEv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN3snf25_GLOBAL__N__a_4_m_cu_7dcf4flatEPf' for 'sm_90'
ptxas info    : Function properties for _ZN3snf25_GLOBAL__N__a_4_m_cu_7dcf4flatEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
[15/17] c++ -c module.cpp
"""

NAME = "conv2d_forward<float, 3>"
LIMIT = Usage(registers=33, shared=512, stack=16, spill=0)
KERNELS = {NAME: {"sm_80": LIMIT, "sm_90": LIMIT}, "sum": {"sm_80": Usage(8, 0, 0, 0)}}


@needs_demangler
def test_log_is_read():
    kernels = cuda_budget.parse(LOG)
    assert kernels == {
        "flat": {"sm_90": Usage(8, 0, 0, 0)},
        "sharp<float, 3>": {"sm_90": Usage(30, 528, 56, 12), "sm_100": Usage(36, 512, 0, 0)},
    }
    assert list(kernels["sharp<float, 3>"]) == ["sm_90", "sm_100"]
    assert cuda_budget.compiler(LOG) == "13.0.88"


def test_log_cut_short_is_an_error():
    cut = LOG[: LOG.index("ptxas info    : Used 36")]
    with pytest.raises(ValueError, match="how many registers a kernel uses; got '_ZN3snf5sharp"):
        cuda_budget.parse(cut)


@needs_demangler
def test_kernel_of_two_files_counts_with_the_worse_values():
    other = LOG.replace("Used 36 registers", "Used 40 registers").replace("512 bytes", "256 bytes")
    for log in (LOG + other, other + LOG):
        assert cuda_budget.parse(log)["sharp<float, 3>"]["sm_100"] == Usage(40, 512, 0, 0)


def test_budget_is_kept_a_line_a_kernel():
    text = cuda_budget.dump(KERNELS, "13.0.88")
    assert cuda_budget.load(text) == (KERNELS, "13.0.88")
    assert [sum(name in line for line in text.splitlines()) for name in KERNELS] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 40}, None),  # handed out in eights
        ({"registers": 41}, "registers 41, allowed 40"),
        ({"registers": 10, "shared": 0, "stack": 0}, None),
        ({"shared": 513}, "shared 513, allowed 512"),
        ({"stack": 24}, "stack 24, allowed 16"),
        ({"spill": 4}, "spill 4, allowed 0"),
    ],
)
def test_more_than_the_budget_is_a_regression(change, message):
    measured = {**KERNELS, NAME: {"sm_80": LIMIT, "sm_90": LIMIT._replace(**change)}}
    expected = [f"{NAME} on sm_90: {message}"] if message else []
    assert cuda_budget.regressions(KERNELS, measured) == expected


def test_no_budget_allows_spills():
    spilling = {NAME: {"sm_80": LIMIT._replace(spill=4)}}
    assert cuda_budget.regressions(spilling, spilling) == [f"{NAME} on sm_80: spill 4, allowed 0"]


def test_budget_and_build_have_the_same_kernels():
    fewer = {NAME: {"sm_90": LIMIT}}
    assert cuda_budget.regressions(KERNELS, fewer) == [
        f"{NAME} on sm_80: in the budget, not built",
        "sum on sm_80: in the budget, not built",
    ]
    assert cuda_budget.regressions(fewer, KERNELS) == [
        f"{NAME} on sm_80: built, not in the budget",
        "sum on sm_80: built, not in the budget",
    ]


@needs_demangler
def test_command(tmp_path, capsys):
    log, budget = tmp_path / "log", tmp_path / "budget.json"

    def status(text, *flags):
        log.write_text(text)
        result = cuda_budget.main([str(log), str(budget), *flags])
        return result, capsys.readouterr().out

    sound = LOG.replace("4 bytes spill stores, 8", "0 bytes spill stores, 0")
    code, out = status(LOG, "--update")
    assert (code, budget.exists()) == (1, False)
    assert "sharp<float, 3> on sm_90: spill 12, allowed 0" in out
    code, out = status(sound, "--update")
    assert code == 0
    assert "36/512" in out
    assert status(sound)[0] == 0
    code, out = status(sound.replace("Used 8 reg", "Used 9 reg").replace("V13.0.88", "V13.1.1"))
    assert code == 1
    assert "flat on sm_90: registers 9, allowed 8" in out
    assert ".ci/cuda_build --update-budget" in out
    assert "The budget is of nvcc 13.0.88, and this is 13.1.1." in out
    with pytest.raises(SystemExit):
        status("release 13.0, V13.0.88")
    assert "names no kernel" in capsys.readouterr().err


def test_committed_budget():
    text = (ROOT / "csrc/cuda/budget.json").read_text(encoding="utf-8")
    kernels, nvcc = cuda_budget.load(text)
    assert text == cuda_budget.dump(kernels, nvcc)
    assert kernels
    for row in kernels.values():
        assert list(row) == ["sm_75", "sm_80", "sm_90", "sm_100"]
    assert cuda_budget.regressions(kernels, kernels) == []


@pytest.mark.nightly
def test_cuda_build():
    """The whole of it: `.ci/run` leaves it out where no source has changed since it last passed."""
    subprocess.run([ROOT / ".ci" / "cuda_build"], check=True)
