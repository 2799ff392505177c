"""What a benchmark run leaves behind: where it ran, a table to read, and a JSON file.

``python -m bench.report [DEVICE]`` prints where it would run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .floors import Floor
from .timing import Noise, Timing

__all__ = ["environment", "headline", "noise_record", "print_table", "rows", "write_json"]

# What the others are measured against: the first of these that was timed.
BASES = (
    *("native, graph", "native, fused Adam, graph", "native", "reference"),
    *("package", "package (blocks)", "package (fourier)", "package (dense)"),  # of exact values
)
PRODUCTS = "products (out=)"  # what limits in microseconds count from
SHORT = 2e-3  # seconds; a table of shorter steps is in microseconds


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
        record["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        record["cuda"] = torch.version.cuda
        record["driver"] = _driver()
    try:
        import snf_ext
    except ImportError:
        record["snf_ext"] = None
    else:
        record["snf_ext"] = {k: _plain(v) for k, v in snf_ext.build_info().items()}
    return record


def headline(record: Mapping[str, Any]) -> str:
    """An environment in one line: the machine, torch and the day."""
    machine = f"{record['processor']}, {record['threads']} threads"
    if "gpu" in record:
        machine = f"{record['gpu']}, driver {record['driver']}"
    return f"{machine}, torch {record['torch']}, {record['date'][:10]}"


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

    if named := os.environ.get("SNF_COMMIT"):  # for a copy of the tree without its history
        return named
    try:
        changed = bool(git("status", "--porcelain", "--", ".", ":!bench/results"))
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return found[0] if found else "unknown"


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
    size = {} if noise.size == 1024 else {"size": noise.size}
    return {
        **size,
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
    graph_us: Mapping[str, float] | None = None,
    over_us: Mapping[str, float] | None = None,
    floors: Mapping[str, Floor] | None = None,
    gpu: bool = False,
) -> list[dict[str, Any]]:
    """One record a variant: quartiles, the ratio to the first, the target and whether it is met.

    ``fraction`` is the rate of the case's necessary operations over the measured product rate, the
    same operations for every variant whatever it really does. Without a native build the ratios are
    to the reference, and no target applies. On a GPU the ratios are to native as a CUDA graph, and
    targets apply only there.
    """
    base = timings[next(name for name in BASES if name in timings)]
    judged = base.name.startswith(("native", "package")) and (
        not gpu or base.name.endswith(", graph")
    )
    result = []
    for name, timing in timings.items():
        low, median, high = timing.quartiles()
        ratio_low, ratio, ratio_high = timing.ratio_to(base)
        target = targets.get(name) if judged else None
        record = {
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
        if floors is not None:
            record |= _against_floor(median, floors[name])
        if gpu:
            record["limit_s"] = None
            limit = (graph_us or {}).get(name.removesuffix(", graph"))
            if limit is not None and name.endswith(", graph"):
                record |= {"limit_s": limit * 1e-6, "met": median <= limit * 1e-6}
        if over_us is not None and name in over_us:
            record |= _over_products(timing, timings[PRODUCTS], over_us[name] * 1e-6)
        result.append(record)
    return result


def _over_products(timing: Timing, products: Timing, limit: float) -> dict[str, Any]:
    """How much longer a step takes than the bare products, paired by round."""
    low, median, high = timing.over(products)
    return {
        "over_s": median,
        "over_q1_s": low,
        "over_q3_s": high,
        "over_limit_s": limit,
        "met": median <= limit,
    }


def _against_floor(median: float, floor: Floor) -> dict[str, Any]:
    return {
        "floor_s": floor.seconds,
        "floor_operations_s": floor.operations,
        "floor_bytes_s": floor.bytes,
        "floor_launches_s": floor.launches,
        "fraction_of_floor": floor.seconds / median,
    }


def print_table(records: Sequence[Mapping[str, Any]]) -> None:
    """One line a variant: median and [quartiles]; milliseconds, where all are short microseconds.

    The rate that is reached gives way to the floor and what is reached of that, where there is one.
    """
    base, with_floor = records[0]["ratio_base"], "floor_s" in records[0]
    short = max(r["median_s"] for r in records) < SHORT
    unit, scale, digits = ("us", 1e6, 1) if short else ("ms", 1e3, 3)
    name_width = max(22, len(records[0]["case"]) + 1, *(len(r["variant"]) + 3 for r in records))
    ratio_width = max(12, len(base) + 3)
    last = f"{'floor':>8}{'reached':>9}" if with_floor else f"{'of rate':>8}"
    print(
        f"{records[0]['case']:<{name_width}}{unit:>9}  {'[quartiles]':<19}"
        f"{'/ ' + base:>{ratio_width}}  {'[quartiles]':<17}{last}  target"
    )
    for r in records:
        spread = f"[{r['q1_s'] * scale:.{digits}f} {r['q3_s'] * scale:.{digits}f}]"
        ratios = f"[{r['ratio_q1']:.2f} {r['ratio_q3']:.2f}]"
        last = f"{r['fraction_of_product_rate']:>8.2f}"
        if with_floor:
            last = f"{r['floor_s'] * scale:>8.{digits}f}{r['fraction_of_floor']:>9.2f}"
        print(
            f"  {r['variant']:<{name_width - 2}}{r['median_s'] * scale:>9.{digits}f}  {spread:<19}"
            f"{r['ratio']:>{ratio_width}.2f}  {ratios:<17}{last}  {_target(r)}".rstrip()
        )
    print(flush=True)


def _target(record: Mapping[str, Any]) -> str:
    met = "met" if record["met"] else "NOT MET"
    if record.get("limit_s") is not None:
        return f"<= {record['limit_s'] * 1e6:g} us {met}"
    if "over_s" in record:
        over, limit = record["over_s"] * 1e6, record["over_limit_s"] * 1e6
        return f"{over:.1f} us over {PRODUCTS}, <= {limit:g} {met}"
    return "" if record["target"] is None else f">= {record['target']:<5.3g} {met}"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes aside and renames, so that no reader ever finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    where = environment(" ".join(["python -m bench.report", *sys.argv[1:]]), *sys.argv[1:2])
    print(f"{json.dumps(where, indent=1)}\n{headline(where)}, commit {where['commit']}")
