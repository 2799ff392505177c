"""What the build makes: the contents of sdist and wheel, pure-Python installs, error messages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import needs_native

import snf_ext
import snf_ext.info
from snf_ext import build_record

ROOT = Path(__file__).resolve().parents[1]

in_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")

REPORT = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import snf_ext
layer = snf_ext.SelfNormLinear(4)
z, log_det, recon = layer(torch.randn(3, 4))
(z.sum() + log_det.sum() + recon.sum()).backward()
ours = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
import json
print(json.dumps({"backend": snf_ext.backend(), "file": snf_ext.__file__, "warnings": ours,
                  "gradient": layer.weight_inv.grad.abs().sum().item(),
                  "info": snf_ext.build_info()}))
"""


def run(*command, cwd, **environment):
    """A command's result, in an environment without this process's snf_ext settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SNF_EXT", "FORCE_CUDA"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def succeed(*command, cwd, **environment):
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def tracked() -> set[str]:
    """The files of the source tree: those that git knows or would add, and that are there."""
    listing = succeed("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).stdout
    return {name for name in listing.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the source tree, as a fresh clone has it."""
    copy = tmp_path_factory.mktemp("tree") / "snf_ext"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def wheel_of(tree: Path, out: Path, **environment) -> Path:
    succeed(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--no-index", "-w", out, tree),
        cwd=out.parent,
        **environment,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def report_of(wheel: Path, folder: Path, packages: Path | None = None, **environment) -> dict:
    """What a process says in a virtual environment that has the wheel beside a torch.

    It is that in the folder ``packages``, or the one of this process.
    """
    venv.create(folder)
    python = folder / "bin" / "python"
    site = Path(
        succeed(
            *(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"), cwd=folder
        ).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Unlike PYTHONPATH, this leaves out hooks such as an editable install of snf_ext.
    (site / "torch.pth").write_text(str(packages or Path(torch.__file__).parents[1]))
    report = json.loads(succeed(python, "-c", REPORT, cwd=folder, **environment).stdout)
    assert Path(report["file"]).is_relative_to(site)
    return report


def python_files() -> set[str]:
    """What every wheel holds: the package's modules, its type information, the build's record."""
    modules = {name for name in tracked() if name.startswith("snf_ext/")}
    assert {"snf_ext/__init__.py", "snf_ext/py.typed"} < modules
    return modules | {"snf_ext/_build.json"}


# --- quick -------------------------------------------------------------------------------------


@pytest.fixture
def metadata():
    try:
        return importlib.metadata.metadata("snf_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("snf_ext runs from its source tree, not installed")


def test_one_version(metadata):
    if (ROOT / "CHANGELOG.md").exists():
        assert snf_ext.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert snf_ext.build_info()["version"] == snf_ext.__version__
    assert metadata["Version"].split("+")[0] == snf_ext.__version__  # a wheel's names torch too


def test_extras_and_command(metadata):
    assert {"train", "test", "bench", "dev"} <= set(metadata.get_all("Provides-Extra"))
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="snf-ext")
    assert script.value == "snf_ext.cli:main"


def test_info_prints_what_runs():
    text = snf_ext.info.report()
    assert snf_ext.__version__ in text
    assert f"{torch.__version__} running" in text
    assert re.search(rf"^backend +{snf_ext.backend()}$", text, flags=re.MULTILINE)
    assert "CUDA kernels" in text


@needs_native
def test_library_runs_on_all_of_torchs_threads():
    """In a process of its own, where no other package has brought an OpenMP runtime."""
    code = """
import torch, snf_ext._C as library
torch.set_num_threads(2)
print(library.parallel_threads())
pools = {line.split()[-1] for line in open("/proc/self/maps") if "omp.so" in line}
print(len(pools))
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    threads, pools = succeed(sys.executable, "-c", code, cwd=ROOT).stdout.split()
    assert threads == ("2" if snf_ext.build_info()["compiler"].startswith("gcc") else "1")
    assert pools == "1", "a second OpenMP runtime fights with torch's for the cores"


@needs_native
def test_library_carries_no_debug_information_or_own_openmp():
    library = Path(sys.modules["snf_ext._C"].__file__)
    assert b"libgomp" not in library.read_bytes()
    assert library.stat().st_size < 20e6


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "was never built"),
        ({"reason": "no C++ compiler was found", "torch": None}, "no C++ compiler was found"),
        ({"reason": None, "torch": "2.11.0+cpu"}, "built against torch 2.11.0+cpu and torch 2.13"),
        ({"reason": None, "torch": "2.13.0"}, "undefined symbol"),
    ],
)
def test_failed_import_is_explained(tmp_path, monkeypatch, record, message):
    path = tmp_path / "_build.json"
    if record is not None:
        path.write_text(json.dumps(record))
    monkeypatch.setattr(build_record, "RECORD", path)
    text = build_record.why_not_loaded(ImportError("undefined symbol: x"), "2.13.0+cpu")
    assert message in text
    assert "\n" not in text


@in_clone
def test_no_torch_is_one_line_with_the_command(tree, tmp_path):
    """The build stops before it downloads anything; an sdist needs no torch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    build = run(sys.executable, "setup.py", "dist_info", cwd=tree, PYTHONPATH=str(tmp_path))
    assert build.returncode == 1
    assert len(build.stderr.strip().splitlines()) == 1
    assert build.stderr.rstrip().endswith(
        "run: pip install torch && pip install --no-build-isolation ."
    )
    sdist = run(
        *(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path),
        cwd=tree,
        PYTHONPATH=str(tmp_path),
    )
    assert sdist.returncode == 0, sdist.stderr


@in_clone
def test_old_torch_is_one_line_with_both_versions(tree, tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.4.1'")
    build = run(sys.executable, "setup.py", "dist_info", cwd=tree, PYTHONPATH=str(tmp_path))
    assert build.returncode == 1
    assert build.stderr.startswith("snf_ext: needs torch >= 2.11, and 2.4.1 is installed")


@in_clone
def test_required_extension_without_compiler_fails(tree):
    build = run(
        *(sys.executable, "setup.py", "dist_info"),
        cwd=tree,
        CXX="/no/such/compiler",
        SNF_EXT_REQUIRE_EXT="1",
    )
    assert build.returncode == 1
    assert "no C++ compiler was found (/no/such/compiler does not run)" in build.stderr


# --- real builds --------------------------------------------------------------------------------


@in_clone
def test_pure_python_wheel_works(tree, tmp_path):
    wheel = wheel_of(tree, tmp_path / "wheel", SNF_EXT_NO_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert members(wheel) == python_files()
    report = report_of(wheel, tmp_path / "installed", SNF_EXT_BACKEND="reference")
    assert report["backend"] == "reference"
    assert report["gradient"] > 0
    assert report["warnings"] == []


@in_clone
def test_without_compiler_the_install_works_and_says_so_once(tree, tmp_path):
    wheel = wheel_of(tree, tmp_path / "wheel", CXX="/no/such/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    report = report_of(wheel, tmp_path / "installed")
    assert report["backend"] == "reference"
    assert report["gradient"] > 0
    (warning,) = report["warnings"]
    assert "no C++ compiler was found (/no/such/compiler does not run)" in warning
    assert "pip install --no-build-isolation ." in warning


@in_clone
@pytest.mark.slow
def test_failed_compilation_falls_back_unless_the_extension_is_required(tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    for source in (broken / "csrc").rglob("*.cpp"):
        source.write_text("#error broken\n")
    wheel = wheel_of(broken, tmp_path / "wheel")
    assert members(wheel) == python_files()
    report = report_of(wheel, tmp_path / "installed")
    assert report["backend"] == "reference"
    assert "compiling the extension failed" in report["warnings"][0]
    required = run(sys.executable, "setup.py", "build_ext", cwd=broken, SNF_EXT_REQUIRE_EXT="1")
    assert required.returncode != 0


@pytest.fixture(scope="session")
def released(tree, tmp_path_factory):
    """What the release script makes of the tree: folder, sdist and wheel."""
    pytest.importorskip("auditwheel", reason="needs the extra [dev]")
    out = tmp_path_factory.getbasetemp() / "sdist"  # .ci/run knows that the build is in there
    script = tree / ".ci" / "release"
    result = succeed(script, "--dry-run", out, cwd=tree, PYTHON=sys.executable)
    assert "trains, evaluates and samples" in result.stdout  # in an environment of its own
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return out, sdist, wheel


@in_clone
@pytest.mark.slow
def test_the_release_is_complete(released):
    out, sdist, wheel = released
    succeed("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=out)
    assert {path.name for path in out.iterdir()} == {sdist.name, wheel.name, "SHA256SUMS"}
    with tarfile.open(sdist) as archive:
        packed = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    assert {name for name in tracked() if not name.startswith("bench/results/")} <= packed
    libraries = {name for name in members(wheel) if name.endswith(".so")}
    assert len(libraries) == 1
    assert libraries.pop().startswith("snf_ext/_C.")
    files = {name for name in members(wheel) if not name.endswith((".so", "/"))}
    assert files == python_files()
    release = build_record.release(torch.__version__)
    assert wheel.name.startswith(f"snf_ext-{snf_ext.__version__}+torch{release}.cpu-cp3")
    assert "-manylinux_2_" in wheel.name


@in_clone
@pytest.mark.slow
def test_the_released_wheel_runs_without_a_compiler(released, tmp_path):
    report = report_of(released[2], tmp_path / "installed", PATH="/nonexistent", CXX="/no/compiler")
    assert report["backend"] == "native"
    assert report["gradient"] > 0
    assert report["warnings"] == []
    assert report["info"]["torch"] == torch.__version__.split("+")[0]


@in_clone
@pytest.mark.slow
def test_the_released_wheel_beside_another_torch(released, tmp_path):
    """Beside the oldest one supported, where .ci/cuda_build has installed it."""
    python = ".".join(map(str, sys.version_info[:2]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snf_ext"
    env = Path(os.environ.get("SNF_CUDA_ENV") or cache / f"cuda-torch-2.11.0-python{python}")
    if not (env / "complete").exists():
        pytest.skip(f"needs the environment {env}, which .ci/cuda_build makes")
    packages = env / "lib" / f"python{python}" / "site-packages"
    installed = tmp_path / "installed"
    report = report_of(released[2], installed, packages, CUDA_VISIBLE_DEVICES="")
    other = report["info"]["torch"]
    assert build_record.release(other) != build_record.release(torch.__version__)
    assert report["backend"] == "reference"
    assert report["gradient"] > 0
    (warning,) = report["warnings"]
    assert f"built against torch {torch.__version__} and torch {other} is running" in warning
    info = succeed(installed / "bin" / "python", "-m", "snf_ext.info", cwd=installed).stdout
    assert f"MISMATCH: built against torch {torch.__version__}, running torch {other}" in info
