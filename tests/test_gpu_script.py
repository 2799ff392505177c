"""bench/gpu.sh on a machine without a GPU: what it runs, and when it stops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STUB = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *bench.summary*) exec "$REAL_PYTHON" "$@" ;;
  *"compare conv"*) echo 'a line before'; echo 'targets met: 5 of 5' ;;
  *"compare linear"*) echo 'boom'; exit 3 ;;
  *"compare models"*) sleep 30 ;;
  *) echo "fine: $*" ;;
esac
"""


def run_script(folder, budget):
    """Runs bench/gpu.sh with a stand-in for python; returns the process, its table, the calls."""
    bash = shutil.which("bash")
    if bash is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")
    tools = folder / "tools"
    tools.mkdir()
    for name, text in {"python": STUB, "nvcc": "#!/bin/bash\necho Cuda 13\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "CUDA_HOME")}
    env |= {"PATH": f"{tools}:{env['PATH']}", "SNF_GPU_BUDGET_S": str(budget)}
    env |= {"CALLS": str(folder / "calls"), "REAL_PYTHON": sys.executable}
    script = [bash, str(ROOT / "bench" / "gpu.sh"), str(folder / "out")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    table = (folder / "out" / "summary.txt").read_text()
    sections = {line.split()[0]: line for line in table.split("total ")[0].splitlines()}
    calls = folder / "calls"
    return done, sections, calls.read_text().splitlines() if calls.exists() else []


def test_script_goes_on_after_failures_and_stops_at_the_deadline(tmp_path):
    done, sections, calls = run_script(tmp_path, budget=14)
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("device", "build", "tests"):
        assert " ok " in sections[name], sections
    assert " ok " in sections["conv"]
    assert sections["conv"].endswith("targets met: 5 of 5")
    assert "FAILED" in sections["linear"]
    assert sections["linear"].endswith("boom")
    assert "timed out" in sections["models"]
    assert "skipped" in sections["racecheck"]
    assert (tmp_path / "out" / "logs" / "linear.log").read_text() == "boom\n"
    assert "case " in (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith((tmp_path / "out" / "summary.txt").read_text())

    assert "setup.py build_ext --inplace" in calls
    tests = next(c for c in calls if "--junitxml" in c)
    assert {"-m", "cuda", "tests", "--continue-on-collection-errors"} <= set(tests.split())
    conv = next(c for c in calls if "compare conv" in c)
    assert f"--out {tmp_path}/out/conv-cuda.json" in conv
    assert "--device cuda --graph --compile" in conv


def test_script_trains_a_row_of_table_1_alone(tmp_path, monkeypatch):
    (tmp_path / "earlier" / "table1").mkdir(parents=True)
    monkeypatch.setenv("SNF_TABLE1", "/data")
    monkeypatch.setenv("SNF_EARLIER", str(tmp_path / "earlier"))
    done, sections, calls = run_script(tmp_path, budget=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(sections) == ["device", "build", "table1"]
    trained = calls[-1]
    assert trained.startswith(
        "-m snf_ext reproduce table1 --only fc-snf --seeds 1 --data-dir /data"
    )
    assert trained.endswith(f"--out {tmp_path}/out/reproduced --device cuda --no-progress")
    assert (tmp_path / "out/reproduced/table1").is_dir()  # goes on from there
    assert not any("-m pytest" in call or "bench.compare" in call for call in calls)


def test_script_without_time_runs_nothing(tmp_path):
    done, sections, calls = run_script(tmp_path, budget=0)
    assert done.returncode == 1
    assert len(sections) >= 8
    assert all("skipped" in line for line in sections.values())
    assert [call.split()[:2] for call in calls] == [["-m", "bench.summary"]]


def test_script_wants_a_folder():
    script = ["bash", str(ROOT / "bench" / "gpu.sh")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: bench/gpu.sh OUT\n")


def test_modules_that_need_a_missing_package_are_skipped(tmp_path):
    (tmp_path / "test_here.py").write_text("def test_nothing():\n    pass\n")
    (tmp_path / "test_missing.py").write_text("import package_that_is_nowhere\n")
    (tmp_path / "test_ours.py").write_text("import bench.nowhere\n")
    command = [sys.executable, "-m", "pytest", "-p", "bench.missing_packages", "-q", "-rsE"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", str(tmp_path)]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "package_that_is_nowhere is not installed" in done.stdout, done.stderr
    assert "1 passed, 1 skipped, 1 error" in done.stdout
    assert done.returncode != 0
