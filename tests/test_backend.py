"""Which code runs, and what a machine without the compiled library sees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import needs_native

import snf_ext


def python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )


BLOCKED = "import sys; sys.modules['snf_ext._C'] = None; "


def test_build_info():
    info = snf_ext.build_info()
    assert {"cpp", "cuda", "cuda_archs", "torch", "version"} <= info.keys()
    assert isinstance(info["cpp"], bool)
    assert isinstance(info["cuda"], bool)
    assert info["version"] == snf_ext.__version__


def test_use_backend_restores_the_choice():
    before = snf_ext.backend()
    with snf_ext.use_backend("reference"):
        assert snf_ext.backend() == "reference"
    assert snf_ext.backend() == before
    with pytest.raises(ValueError, match="name must be one of native, reference; got 'fast'"):
        snf_ext.use_backend("fast")


@needs_native
def test_the_backend_in_use_is_the_one_that_runs():
    x, w = torch.randn(2, 3), torch.eye(3)
    for name, called in (("native", True), ("reference", False)):
        with snf_ext.use_backend(name), torch.profiler.profile() as profile:
            snf_ext.ops.snf_linear(x, w, w)
        ran = any(e.name == "snf_ext::snf_linear_forward" for e in profile.events())
        assert ran is called


def test_without_the_library_one_warning_and_the_reference():
    result = python(
        BLOCKED + "import snf_ext, torch; print(snf_ext.backend(), snf_ext.build_info()['cpp']); "
        "snf_ext.models.fc((1, 4, 4)).loss(torch.zeros(2, 1, 4, 4)).backward()",
        SNF_EXT_BACKEND="",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["reference", "False"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert "pip install --no-build-isolation ." in result.stderr


def test_variable_chooses_the_reference_quietly():
    result = python(
        BLOCKED + "import snf_ext; print(snf_ext.backend())", SNF_EXT_BACKEND="reference"
    )
    assert result.stdout.split() == ["reference"]
    assert not result.stderr


def test_variable_asks_for_what_is_not_there():
    result = python(BLOCKED + "import snf_ext", SNF_EXT_BACKEND="native")
    assert result.returncode != 0
    assert "SNF_EXT_BACKEND is 'native', but the compiled library cannot be loaded" in result.stderr
    result = python("import snf_ext", SNF_EXT_BACKEND="fast")
    assert "SNF_EXT_BACKEND must be one of native, reference; got 'fast'" in result.stderr


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers(capability, tmp_path):
    """Each in a process of its own; sets that the processor lacks fall back to one it has."""
    code = """
import sys, torch, snf_ext
torch.manual_seed(0)
out = []
for shape, k in (((3, 2, 5, 7), 3), ((2, 17, 3, 4), 3), ((2, 3, 4, 4), 1), ((1, 40, 3, 3), 5)):
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        w, r = (torch.randn(shape[1], shape[1], k, k, dtype=dtype).div(k * shape[1] ** 0.5)
                .requires_grad_() for _ in range(2))
        with snf_ext.use_backend(sys.argv[1]):
            z, log_det, recon = snf_ext.ops.snf_conv2d(x, w, r)
        out += torch.autograd.grad(z.square().sum() + log_det.sum() + recon.sum(), (x, w, r))
        out.append(recon.detach())
torch.save(out, sys.argv[2])
"""
    results = {}
    for backend in ("native", "reference"):
        path = tmp_path / f"{backend}.pt"
        env = {**os.environ, "SNF_EXT_CPU_CAPABILITY": capability}
        subprocess.run(
            [sys.executable, "-c", code, backend, str(path)], check=True, env=env, timeout=120
        )
        results[backend] = torch.load(path)
    for a, b in zip(results["native"], results["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
