"""What a benchmark run leaves behind: where it ran, a table to read, and a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .timing import Noise, Timing

__all__ = ["environment", "noise_record", "print_table", "rows", "write_json"]


def environment(command: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, commit, machine, threads and date of this run."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    try:
        import snf_ext
    except ImportError:
        record["snf_ext"] = None
    else:
        record["snf_ext"] = {k: _plain(v) for k, v in snf_ext.build_info().items()}
    return record


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = bool(git("status", "--porcelain", "--", ".", ":!bench/results"))
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """Model name, and the family and model number that a virtual machine's name may hide."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    info = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info.get('cpu family')}, model {info.get('model')})"


def noise_record(noise: Noise) -> dict[str, float]:
    return {
        "median_s": noise.median,
        "fastest_s": noise.fastest,
        "slowest_s": noise.slowest,
        "gflops": noise.rate / 1e9,
    }


def rows(
    case: str,
    timings: Mapping[str, Timing],
    *,
    flops: float,
    targets: Mapping[str, float],
    rate: float,
) -> list[dict[str, Any]]:
    """One record a variant: quartiles, the ratio to native, the target and whether it is met.

    ``fraction`` is the rate of the case's necessary operations over the measured product rate, the
    same operations for every variant whatever it really does. Without a native build the ratios are
    to the reference, and no target applies.
    """
    native = "native" in timings
    base = timings["native" if native else "reference"]
    result = []
    for name, timing in timings.items():
        low, median, high = timing.quartiles()
        ratio_low, ratio, ratio_high = timing.ratio_to(base)
        target = targets.get(name) if native else None
        result.append(
            {
                "case": case,
                "variant": name,
                "median_s": median,
                "q1_s": low,
                "q3_s": high,
                "fastest_s": min(timing.seconds),
                "rounds": len(timing.seconds),
                "calls_per_round": timing.inner,
                "ratio_base": base.name,
                "ratio": ratio,
                "ratio_q1": ratio_low,
                "ratio_q3": ratio_high,
                "fraction_of_product_rate": flops / median / rate,
                "target": target,
                "met": None if target is None else ratio >= target,
            }
        )
    return result


def print_table(records: Sequence[Mapping[str, Any]]) -> None:
    """One line a variant; times in milliseconds as median and [quartiles]."""
    base = records[0]["ratio_base"]
    print(
        f"{records[0]['case']:<22}{'ms':>9}  {'[quartiles]':<19}{'/ ' + base:>12}  "
        f"{'[quartiles]':<17}{'of rate':>8}  target"
    )
    for r in records:
        spread = f"[{r['q1_s'] * 1e3:.3f} {r['q3_s'] * 1e3:.3f}]"
        ratios = f"[{r['ratio_q1']:.2f} {r['ratio_q3']:.2f}]"
        target = ""
        if r["target"] is not None:
            target = f">= {r['target']:<5} {'met' if r['met'] else 'NOT MET'}"
        print(
            f"  {r['variant']:<20}{r['median_s'] * 1e3:>9.3f}  {spread:<19}{r['ratio']:>12.2f}  "
            f"{ratios:<17}{r['fraction_of_product_rate']:>8.2f}  {target}".rstrip()
        )
    print(flush=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes aside and renames, so that no reader ever finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
