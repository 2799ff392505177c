"""What an experiment leaves to read: ``NAME.json``, ``NAME.md`` and ``NAME.png``."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backend import backend, build_info
from ..training.checkpoint import write_aside, write_json


def write(record: Mapping[str, Any], out: Path) -> None:
    """Write ``out/NAME.json`` and ``out/NAME.md``, each aside first."""
    name = record["experiment"]
    write_json(out / f"{name}.json", record)
    with write_aside(out / f"{name}.md") as part:
        part.write_text(markdown(record), encoding="utf-8")


def environment(command: str, device: torch.device) -> dict[str, Any]:
    """Where and with what an experiment ran."""
    info = build_info()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "snf_ext": info["version"],
        "backend": backend(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str | None:
    """Of the clone that the package is in; None if it is in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ("git", *arguments), cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page: the table, what was reduced, what was decided, where it ran."""
    where = record["environment"]
    lines = [
        f"# {record['title']}",
        "",
        f"`{where['command']}`, {where['date'][:10]}. Scale **{record['scale']}**.",
        record["says"],
        "",
    ]
    if record["reductions"]:
        lines += ["Reduced:", "", *(f"- {text}" for text in record["reductions"]), ""]
    lines += _table(record)
    if record["seeds"] > 1:
        lines += ["", f"Mean ± sample standard deviation of {record['seeds']} seeds."]
    for name, fit in record.get("fits", {}).items():
        lines += ["", f"{name}: {fit['says']}"]
    if record["notes"]:
        lines += ["", *(f"- {note}" for note in record["notes"])]
    troubles = [
        f"- {row['name']}, seed {run['seed']}: {run.get('diverged') or run['failed']}"
        for row in record["rows"]
        for run in row["runs"]
        if "diverged" in run or "failed" in run
    ]
    if troubles:
        lines += ["", "Runs that did not end:", "", *troubles]
    device = where.get("gpu") or f"{where['machine']}, {where['threads']} threads"
    versions = f"snf_ext {where['snf_ext']} ({where['backend']}), torch {where['torch']}"
    commit = f", commit {where['commit']}" if where["commit"] else ""
    lines += ["", f"On {device}; {versions}, Python {where['python']}{commit}."]
    return "\n".join(lines) + "\n"


def _table(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "| row | unit | paper | here | difference | runs | epochs | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        title = row["title"] + (" (ours)" if row["ours"] else "")
        for measure in record["measures"]:
            found = row["measures"][measure["key"]]
            cells = (
                title,
                measure["unit"],
                _paper(found, measure["digits"]),
                _here(row, found, measure["digits"]),
                _number(found["difference"], measure["digits"], "+"),
                f"{len(row['runs']) - row['failed']} of {record['seeds']}",
                "" if row["epochs"] is None else str(row["epochs"]),
                _number(row["seconds"], 1),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None, digits: int, sign: str = "") -> str:
    if value is None:
        return ""
    large = abs(value) >= 1e6 or 0 < abs(value) < 0.5 * 10**-digits
    return f"{value:{sign}.3g}" if large else f"{value:{sign}.{digits}f}"


def _paper(found: Mapping[str, Any], digits: int) -> str:
    if found["paper_diverged"]:
        return "-"
    deviation = found["paper_std"]
    spread = "" if deviation is None else f" ± {_number(deviation, digits)}"
    return _number(found["paper"], digits) + spread


def _here(row: Mapping[str, Any], found: Mapping[str, Any], digits: int) -> str:
    """The number; "-" where training diverged, as in the papers."""
    if found["mean"] is None:
        return (
            "-"
            if row["diverged"]
            else "failed"
            if row["failed"]
            else ""
            if row["runs"]
            else "not done"
        )
    text = _number(found["mean"], digits)
    if found["std"] is not None:
        text += f" ± {_number(found['std'], digits)}"
    if "q1" in found:
        text += f" [{_number(found['q1'], digits)} {_number(found['q3'], digits)}]"
    if row["diverged"]:
        text += f" ({row['diverged']} of {len(row['runs'])} diverged)"
    return text
