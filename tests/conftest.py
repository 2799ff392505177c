"""What every test shares: devices, backends, and the data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

# Beside other workers (pytest -n) one thread each, in what a test starts too; before torch asks.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from cli_runs import in_own_folder, trained  # noqa: F401
from graph_world import gpu, world  # noqa: F401

import snf_ext

# On a GPU torch's own convolutions, which many channels are left to, otherwise round to TF32.
torch.backends.cudnn.allow_tf32 = False

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_native = pytest.mark.skipif(
    not snf_ext.build_info()["cpp"], reason="the compiled library is not built"
)


@pytest.fixture
def shared() -> Path:
    """The folder of data beside the repository, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return SHARED


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture(params=[*DEVICES, "meta"])
def device_or_meta(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def backend(request):
    """Runs the test on both backends."""
    with snf_ext.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """On matrices this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
