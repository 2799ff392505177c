"""The guard against regressions: what it calls worse, and what it refuses to compare."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import guard, report
from bench.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINE = {
    "processor": "A",
    "cpu_capability": "AVX2",
    "threads": 2,
    "device": "cpu",
    "torch": "2.13",
}


def result(**ratios):
    """Two cases where other variants take so many times as long as native, give or take 4 %."""
    rows = []
    for case in ("small", "large"):
        timings = {"native": Timing("native", 1, [1.0] * 5)}
        for name, ratio in ratios.items():
            spread = [ratio * (1 + off / 100) for off in (-8, -4, 0, 4, 8)]
            timings[name] = Timing(name, 1, spread)
        rows += report.rows(case, timings, flops=1, targets={}, rate=1)
    return {"suite": "linear", "environment": dict(MACHINE), "rows": rows}


def verdicts(before, now, tolerance=0.15):
    found = guard.changes(before, now, tolerance)
    return {(c.case, c.variant): (c.worse, c.better) for c in found}


@pytest.mark.parametrize(
    ("factor", "worse", "better"),
    [
        (1.0, False, False),
        # 0.85 of the first quartile, 0.96, is 0.816; the third is 1.04 times the median.
        (0.80, False, False),
        (0.78, True, False),
        (0.5, True, False),
        (1.25, False, False),
        (1.30, False, True),
    ],
)
def test_worse_is_beyond_tolerance_and_quartiles(factor, worse, better):
    before, now = result(exact=3.0, composed=5.0), result(exact=3.0 * factor, composed=5.0)
    found = verdicts(before, now)
    assert found["small", "exact"] == found["large", "exact"] == (worse, better)
    assert found["small", "composed"] == (False, False)
    assert ("small", "native") not in found


def test_times_do_not_matter():
    before, now = result(exact=3.0), result(exact=3.0)
    for row in now["rows"]:
        row["median_s"] *= 10
    assert not any(worse for worse, _ in verdicts(before, now).values())


def test_tolerance():
    before, now = result(exact=3.0), result(exact=3.0 * 0.78)
    assert verdicts(before, now, 0.15)["small", "exact"] == (True, False)
    assert verdicts(before, now, 0.2)["small", "exact"] == (False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(suite="conv"), "new must be of suite 'linear'; got 'conv'"),
        (
            lambda r: r["environment"].update(processor="B"),
            "new must be of a machine with processor 'A'; got 'B'",
        ),
        (
            lambda r: r["environment"].update(threads=1),
            "new must be of a machine with threads 2; got 1",
        ),
        (
            lambda r: r["environment"].update(gpu="H"),
            "new must be of a machine with gpu None; got 'H'",
        ),
        (lambda r: r.update(rows=[]), "new must be a result of bench.compare; it has no ratios"),
        (
            lambda r: r.update(rows=[{"variant": "tracked", "over_penalty": 1.0}]),
            "new must be a result of bench.compare; it has no ratios",
        ),
        (
            lambda r: [row.update(ratio_base="reference") for row in r["rows"]],
            "new must have ratios to 'native' at small; got 'reference'",
        ),
        (
            lambda r: [row.update(case="other") for row in r["rows"]],
            "new must have a row of the baseline; it has none",
        ),
    ],
)
def test_what_cannot_be_compared(change, message, tmp_path, capsys):
    before, now = result(exact=3.0), result(exact=3.0)
    change(now)
    with pytest.raises(ValueError, match=message):
        guard.changes(before, now, 0.15)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (before, now), strict=True):
        path.write_text(json.dumps(content))
    assert guard.main([str(p) for p in paths]) == 2
    assert capsys.readouterr().err == f"bench.guard: {message}\n"


def test_files_that_cannot_be_read(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert guard.main([str(broken), str(broken)]) == 2
    assert f"{broken} must hold JSON; " in capsys.readouterr().err
    assert guard.main([str(tmp_path / "none.json"), str(broken)]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        guard.main([str(broken), str(broken), "--tolerance", "1.5"])
    assert "--tolerance must be in [0, 1); got 1.5" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    before, now = result(exact=3.0, composed=5.0), result(exact=1.5)
    now["environment"]["torch"] = "2.14"
    for name, content in (("before", before), ("now", now)):
        (tmp_path / name).write_text(json.dumps(content))
    files = [str(tmp_path / "before"), str(tmp_path / "now")]
    assert guard.main(files) == 1
    _, small, large, torch, missing, last = capsys.readouterr().out.splitlines()
    words = "small: exact 3.00 [2.88 3.12] 1.50 [1.44 1.56] -50% WORSE"
    assert " ".join(small.split()) == words
    assert large.startswith("large: exact ")
    assert torch == "torch: 2.13, now 2.14"
    assert missing == "2 of 6 rows of the baseline are not in the new run"
    assert last == "2 of 2 ratios worse by more than 15%"
    assert guard.main([*files, "--tolerance", "0.6"]) == 0
    assert guard.main([files[0], files[0]]) == 0


@pytest.mark.skipif(not RESULTS.is_dir(), reason="needs a clone")
def test_committed_results_are_their_own_baseline():
    """Each committed file of bench.compare can serve, with nothing worse than itself."""
    seen = 0
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "ratio_q1" not in (content.get("rows") or [{}])[0]:
            continue
        found = guard.changes(content, copy.deepcopy(content), 0.0)
        assert not any(c.worse or c.better for c in found), path.name
        seen += 1
    assert seen >= 5


# ---- The nightly job -----------------------------------------------------------------------------

STUB = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *"compare conv"*) exit 1 ;;
  *compare*) echo new >"$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<<"$*")" ;;
  *guard*linear*) exit "$LINEAR" ;;
esac
"""


@pytest.mark.parametrize(
    ("linear", "conv_fails", "status"), [(0, False, 0), (1, False, 1), (1, True, 2)]
)
def test_nightly_job(linear, conv_fails, status, tmp_path):
    """Every suite is timed, those with a baseline are compared, and the worst outcome is told."""
    script = ROOT / ".ci" / "nightly"
    if not script.exists() or shutil.which("bash") is None:
        pytest.skip("needs bash and a clone")
    python, baseline, out = tmp_path / "python", tmp_path / "baseline", tmp_path / "out"
    python.write_text(STUB if conv_fails else STUB.replace("exit 1", ":"))
    python.chmod(0o755)
    baseline.mkdir()
    for suite in ("linear", "spline"):
        (baseline / f"{suite}-cpu.json").touch()
    env = os.environ | {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(
        ["bash", str(script), str(out), str(baseline)],
        env=env | {"LINEAR": str(linear)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "-m pytest -q -m nightly"
    timed = [c.split()[2] for c in calls if "bench.compare" in c]
    assert timed == ["linear", "conv", "models", "spline", "sampling", "figure4"]
    guarded = [c.split()[2:] for c in calls if "bench.guard" in c]
    assert guarded == [
        [f"{baseline}/{suite}-cpu.json", f"{out}/{suite}-cpu.json"]
        for suite in ("linear", "spline")
    ]
    assert f"no baseline: there is no {baseline}/figure4-cpu.json" in done.stdout
