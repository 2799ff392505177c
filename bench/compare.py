"""The authoritative comparison: every variant of a case interleaved in one process.

    python -m bench.compare linear|conv|models [--quick] [--out FILE.json] [--plot FILE.png]

Prints the machine's noise, then one table a case: time, ratio to native (above 1: native is
faster) and the ratio that has to be reached. Variants that claim the same gradients are compared
before they are timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import snf_ext

from . import cases, report, steps
from .timing import Variant, interleave, machine_noise

SUITES: dict[str, tuple[Sequence[Any], Callable[..., list[Variant]]]] = {
    "linear": (cases.LINEAR, steps.linear_variants),
    "conv": (cases.CONV, steps.conv_variants),
    "models": (cases.MODELS, steps.model_variants),
}

# A product's median over the fastest one seen; a machine left alone stays well below.
QUIET = 1.25


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Same precision for all: without this the composition's convolutions would run in TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False

    noise = machine_noise(args.device)
    print(f"{noise}; {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.2f}")
    if not steps.native_is_built():
        where = "the source tree" if _is_source_tree() else "the installed package"
        print(f"native is not built in {where}, which is what runs: ratios are to the reference")
    print(flush=True)

    table, build = SUITES[args.suite]
    chosen = [c for c in table if args.case in c.name and (c.quick or not args.quick)]
    if not chosen:
        print(f"no case of {args.suite} has {args.case!r} in its name", file=sys.stderr)
        return 2

    records: list[dict[str, Any]] = []
    for case in chosen:
        variants = build(case, compiled=args.compile, device=args.device)
        check_gradients(variants)
        timings = interleave(
            variants, rounds=args.rounds, min_sample=args.min_sample, device=args.device
        )
        found = report.rows(
            case.name, timings, flops=case.flops, targets=case.targets, rate=noise.rate
        )
        report.print_table(found)
        records += found

    after = machine_noise(args.device)
    print(f"afterwards, {after}")
    drift = max(noise.median, after.median) / min(noise.fastest, after.fastest)
    if drift > QUIET:
        print(f"the machine was busy ({drift:.2f} times its fastest): do not quote these numbers")
    missed = [r for r in records if r["met"] is False]
    judged = sum(r["met"] is not None for r in records)
    print(f"targets met: {judged - len(missed)} of {judged}")
    for r in missed:
        print(f"  {r['case']}: {r['variant']} / native {r['ratio']:.2f}, wanted {r['target']}")

    if args.out or args.plot:
        result = {
            "suite": args.suite,
            "environment": report.environment(_command(args), args.device),
            "noise_before": report.noise_record(noise),
            "noise_after": report.noise_record(after),
            "rows": records,
        }
        if args.out:
            report.write_json(args.out, result)
        if args.plot:
            from . import plot

            plot.draw(result, args.plot)
    return 0


def check_gradients(variants: Sequence[Variant], tolerance: float = 1e-3) -> None:
    """Raises RuntimeError where two variants that should leave the same gradients do not.

    Each gradient's difference is measured against the largest element of the first one.
    """
    comparable = [v for v in variants if v.leaves]
    expected: list[torch.Tensor] = []
    for v in comparable:
        with v.context():
            v.step()
        actual = [leaf.grad.flatten() for leaf in v.leaves if leaf.grad is not None]
        if len(actual) != len(v.leaves):
            raise RuntimeError(f"{v.name} leaves out a gradient")
        expected = expected or [grad.clone() for grad in actual]
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error <= tolerance:
                first = comparable[0].name
                raise RuntimeError(f"{v.name} and {first} differ by {error:.1e} in gradient {i}")
    for v in comparable:
        for leaf in v.leaves:
            leaf.grad = None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description="Times native steps against baselines."
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--quick", action="store_true", help="the short cases, fewer rounds")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with TEXT in name")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the reference")
    parser.add_argument("--rounds", type=int, help="samples a variant (default 21; quick 7)")
    parser.add_argument("--min-sample", type=float, default=0.02, help="seconds (default 0.02)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.rounds is None:
        args.rounds = 7 if args.quick else 21
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    return args


def _is_source_tree() -> bool:
    return Path(snf_ext.__file__).parents[1] == Path(__file__).parents[1]


def _command(args: argparse.Namespace) -> str:
    """The command line without the folders of this machine."""
    words = ["python -m bench.compare", args.suite]
    words += [f"--{flag}" for flag in ("quick", "compile") if getattr(args, flag)]
    words += [f"--case '{args.case}'"] if args.case else []
    words += [f"--rounds {args.rounds}", f"--min-sample {args.min_sample}"]
    words += [f"--threads {args.threads}"] if args.threads else []
    words += [f"--device {args.device}"]
    words += [f"--{k} {p.name}" for k in ("out", "plot") if (p := getattr(args, k))]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
