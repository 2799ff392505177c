"""A library built here runs on other processors: by its machine code, and on emulated ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_native

import snf_ext

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
instruction_sets = pytest.importorskip("instruction_sets", reason="needs a clone")

needs_objdump = pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
needs_emulator = pytest.mark.skipif(
    not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian: qemu-user)"
)


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("mulps  %xmm1,%xmm0", "baseline"),
        ("tzcnt  %eax,%eax", "baseline"),
        ("call   5a3b0 <snf::avx512::conv2d(float*)>", "baseline"),
        ("vxorps %xmm1,%xmm1,%xmm1", "avx2"),
        ("vfmadd231ps (%rax),%ymm1,%ymm2", "avx2"),
        ("pshufb %xmm1,%xmm0", "avx2"),
        ("pinsrq $0x1,%rax,%xmm0", "avx2"),
        ("roundps $0x1,%xmm0,%xmm0", "avx2"),
        ("popcnt %edi,%eax", "avx2"),
        ("shlx   %rax,%rdx,%rcx", "avx2"),
        ("vmovups (%rax),%zmm4", "avx512"),
        ("vaddps %xmm17,%xmm1,%xmm2", "avx512"),
        ("vmovups %ymm0,(%rax){%k1}", "avx512"),
        ("kmovw  %eax,%k1", "avx512"),
        ("vpternlogd $0xff,%ymm1,%ymm1,%ymm1", "avx512"),
    ],
)
def test_the_set_that_an_instruction_needs(instruction, wanted):
    assert instruction_sets.needed_set(instruction) == wanted


def test_code_in_the_wrong_function_is_found():
    lines = """
0000000000001000 <snf::avx2::kernel(float*)>:
    1000:\tvaddps %ymm0,%ymm1,%ymm2
    1004:\tret
0000000000001010 <std::max(float)>:
    1010:\tvmaxss %xmm0,%xmm1,%xmm0
0000000000001020 <std::max(float)>:
    1020:\tret
0000000000001030 <snf::avx2::other(float*)>:
    1030:\tvaddps %zmm0,%zmm1,%zmm2
""".splitlines()
    counts, problems = instruction_sets.scan(lines)
    assert counts == {"avx2": 2, "baseline": 1, "avx512": 1}
    assert problems == [
        "std::max(float): vmaxss %xmm0,%xmm1,%xmm0",
        "snf::avx2::other(float*): vaddps %zmm0,%zmm1,%zmm2",
    ]


@needs_objdump
@needs_native
def test_the_library_runs_on_any_processor():
    found = instruction_sets.check(sys.modules["snf_ext._C"].__file__)
    assert isinstance(found, str), "\n".join(found)


@needs_objdump
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
@pytest.mark.parametrize("flag", ["-mavx2", "-mavx512f", "-msse4.2"])
def test_a_library_of_newer_code_is_found(tmp_path, flag):
    source = tmp_path / "newer.cpp"
    source.write_text(
        "float sum(const float* x) { return x[0] + x[1]; }\n"
        "int bits(unsigned x) { return __builtin_popcount(x); }\n"
    )
    library = tmp_path / "newer.so"
    command = ["c++", "-O2", "-shared", "-fPIC", flag, str(source), "-o", str(library)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"the compiler knows no {flag}: not for x86-64")
    problems = instruction_sets.check(str(library))
    assert isinstance(problems, list)
    assert any(line.startswith(("sum(", "bits(")) for line in problems)


def test_no_flag_names_a_processor():
    for name in ("setup.py", "CMakeLists.txt", "tests/cpp/CMakeLists.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not any(flag in text for flag in ("-march", "-mtune", "-mcpu", "-mavx", "-msse"))


# --- on emulated processors ----------------------------------------------------------------------

# One layer of each kind of kernel, against plain torch.
SMOKE = """
import torch
import snf_ext

torch.manual_seed(0)
print(snf_ext.build_info()["cpu_capability"])
event = (4, 6, 6)
layers = [
    snf_ext.SelfNormConv2d(4, 3),
    snf_ext.SmoothLeakyReLU(0.3),
    snf_ext.RationalQuadraticSpline(event),
    snf_ext.AffineCoupling(4, width=8),
    snf_ext.Flatten(event),
    snf_ext.SelfNormLinear(144),
]
flow = snf_ext.Flow(layers, event)
x = torch.randn(2, *event)
found = {}
for backend in ("native", "reference"):
    with snf_ext.use_backend(backend):
        flow.zero_grad()
        flow.train().loss(x).backward()
        gradients = [parameter.grad.clone() for parameter in flow.parameters()]
        found[backend] = [flow.eval().log_prob(x).detach(), *gradients]
for native, reference in zip(*found.values()):
    torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4)
"""


def emulate(processor: str, *command) -> str:
    """What a program prints on a processor, numbers by one thread."""
    result = subprocess.run(
        ["qemu-x86_64", "-cpu", processor, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SNF_EXT_BACKEND": "native"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_emulator
@needs_native
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        # Of 2008, without AVX: the oldest on which numpy and torch run.
        ("Nehalem", "baseline"),
        ("Haswell", "avx2"),
    ],
)
def test_the_package_on_an_emulated_processor(processor, wanted):
    assert emulate(processor, sys.executable, "-c", SMOKE).split() == [wanted]


@needs_emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("processor", "program"),
    [
        *(("core2duo", name) for name in ("elementwise", "linear", "network")),
        ("Opteron_G1", "linear"),  # the first x86-64: SSE2
        ("Nehalem", "conv2d"),  # before it, torch's own convolutions fail
    ],
)
def test_the_operators_on_an_emulated_processor(processor, program):
    path = ROOT / "build" / "cmake" / "tests" / "cpp" / f"test_{program}"
    if not path.exists():
        pytest.skip("needs the C++ tests that CMake builds in build/cmake")
    assert f"test_{program}: ok" in emulate(processor, path)


def test_the_chosen_set_is_one_of_them():
    info = snf_ext.build_info()
    assert info["cpu_capability"] in (instruction_sets.SETS if info["cpp"] else (None,))
