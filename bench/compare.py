"""The authoritative comparison: every variant of a case interleaved in one process.

    python -m bench.compare figure4|linear|conv|models|spline|sampling|exact [--quick]
        [--out FILE] [--plot FILE]

Prints the machine's noise, then one table a case: time, ratio to native (above 1: native is
faster), the floor and how much of it is reached, and the ratio that has to be. Variants that claim
the same gradients are compared before they are timed. With ``--device cuda``, ``--graph`` also
times every step that can be captured as a CUDA graph. ``exact`` has no floors; it also times all
sizes of blocks and measures memory. ``figure4`` ends with what the times grow with. The JSON file
is written after each case, so that a run that is cut short leaves what it had. The exit status is 1
where a case failed; a missed target is no failure.
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

from . import (
    cases,
    dispatches,
    exact,
    exact_cases,
    exact_memory,
    floors,
    graphs,
    growth,
    models,
    report,
    sampling,
    spline,
    steps,
)
from .timing import Noise, Variant, interleave, machine_noise


def figure4_variants(case: Any, **options: Any) -> list[Variant]:
    """A fully connected layer or a convolution."""
    linear = isinstance(case, cases.LinearCase)
    return (steps.linear_variants if linear else steps.conv_variants)(case, **options)


SUITES: dict[str, Callable[..., list[Variant]]] = {
    "linear": steps.linear_variants,
    "conv": steps.conv_variants,
    "models": steps.model_variants,
    "spline": spline.spline_variants,
    "exact": exact.exact_variants,
    "figure4": figure4_variants,
    "sampling": sampling.sample_variants,
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
    rates = None
    if torch.device(args.device).type == "cuda":
        rates = floors.measure(args.device, noise.rate)
    elif args.suite != "exact":
        rates = floors.measure_cpu(noise.rate)
    if rates is not None:
        print(f"{rates}\n{rates.formula}")
    if not steps.native_is_built(args.device):
        where = "the source tree" if _is_source_tree() else "the installed package"
        print(f"native is not built in {where}, which is what runs: ratios are to the reference")
    print(flush=True)

    table = cases.table(args.suite, torch.device(args.device).type)
    chosen = [c for c in table if args.case in c.name and (c.quick or not args.quick)]
    if not chosen:
        print(f"no case of {args.suite} has {args.case!r} in its name", file=sys.stderr)
        return 2

    result = _Result(args, noise, rates)
    for case in chosen:
        try:
            _measure(case, result)
        except RuntimeError as error:
            result.problem(f"{case.name}: {error}")
        result.save()

    after = machine_noise(args.device)
    print(f"afterwards, {after}")
    drift = max(noise.median, after.median) / min(noise.fastest, after.fastest)
    if drift > QUIET:
        print(f"the machine was busy ({drift:.2f} times its fastest): do not quote these numbers")
    if args.suite == "figure4":
        result.growth = growth.growth(result.rows)
        print("\n".join(growth.lines(result.growth)))
    rows = [*result.rows, *result.memory, *result.growth]
    missed = [r for r in rows if r["met"] is False]
    judged = sum(r["met"] is not None for r in rows)
    print(f"targets met: {judged - len(missed)} of {judged}")
    for r in missed:
        print(f"  {r.get('case', 'growth')}: {_missed(r)}")
    result.save(after)
    if args.plot and result.rows:
        result.draw(args.plot)
    return 1 if result.problems else 0


def _measure(case: Any, result: _Result) -> None:
    """Checks and times the variants of one case, and adds what it finds to the result.

    Raises:
        RuntimeError: a step fails, or two do not leave the same gradients; a model's likelihood or
            gradients are not those of the composition.
    """
    args, rates = result.args, result.rates
    if isinstance(case, exact_cases.MemoryCase):
        result.memory.append(exact_memory.measure(case))
        return
    for backend in steps.backends(args.device):
        if isinstance(case, cases.ModelCase):
            models.check_agreement(case, backend, args.device)
        elif isinstance(case, sampling.SampleCase):
            sampling.check_samples(case, backend)
    variants = SUITES[args.suite](case, compiled=args.compile, device=args.device)
    variants = without_broken_compiled(variants, lambda text: result.note(f"{case.name}: {text}"))
    if args.graph:
        captured, reasons = graphs.graphed(variants)
        for v in variants:
            if v.name in reasons:
                text = f"{case.name}: {v.name} is not timed as a CUDA graph: {reasons[v.name]}"
                failed = v.name.startswith("native") and not v.no_graph
                (result.problem if failed else result.note)(text)
        variants += captured
    if isinstance(case, exact_cases.ExactCase):
        exact.check_values(variants)
    else:
        check_gradients(variants)
    counts = _dispatches(variants) if isinstance(case, cases.ModelCase) else {}
    rounds = min(args.rounds, getattr(case, "rounds", None) or args.rounds)
    timings = interleave(variants, rounds=rounds, min_sample=args.min_sample, device=args.device)
    bounds = None
    if rates is not None:
        bounds = {v.name: floors.floor(case, rates, adam=v.adam, tf32=v.tf32) for v in variants}
    found = report.rows(
        case.name,
        timings,
        flops=case.flops,
        targets=case.targets,
        rate=result.noise.rate,
        graph_us=case.graph_us,
        over_us=getattr(case, "over_us", None),
        floors=bounds,
        gpu=rates is not None and rates.gpu,
    )
    report.print_table(found)
    for row in found:
        row |= getattr(case, "numbers", {})
    if counts:
        for row in found:
            row["dispatches"] = counts.get(row["variant"])
        listed = "; ".join(f"{name} {number}" for name, number in counts.items())
        print(f"operators dispatched a step: {listed}\n", flush=True)
    result.rows += found
    if isinstance(case, exact_cases.ExactCase):
        result.layouts += exact.layout_rows(case, args.rounds, args.min_sample)


def _dispatches(variants: Sequence[Variant]) -> dict[str, int]:
    """Operators that a training step of each variant dispatches; a replayed graph does none.

    Not of compiled ones: under the mode that counts, torch.compile gives a function up for good.
    """
    counts = {}
    for v in variants:
        if v.adam and not v.name.startswith("compiled") and not v.name.endswith(", graph"):
            with v.context():
                counts[v.name] = dispatches.count(v.step).total()
    return counts


class _Result:
    """What the run has found so far, and the file that holds it."""

    def __init__(self, args: argparse.Namespace, noise: Noise, rates: floors.Rates | None) -> None:
        self.args, self.noise, self.rates = args, noise, rates
        self.rows: list[dict[str, Any]] = []
        self.layouts: list[dict[str, Any]] = []  # sizes of blocks, of exact cases
        self.memory: list[dict[str, Any]] = []
        self.growth: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"FAILED {text}\n", flush=True)

    def record(self, after: Noise | None) -> dict[str, Any]:
        record: dict[str, Any] = {
            "suite": self.args.suite,
            "environment": report.environment(_command(self.args), self.args.device),
            "noise_before": report.noise_record(self.noise),
            "noise_after": None if after is None else report.noise_record(after),
        }
        if self.rates is not None:
            record |= {"step": steps.GPU_STEP} if self.rates.gpu else {}
            record |= {"floor": self.rates.formula, "rates": self.rates.record()}
        optional = ("notes", "problems", "layouts", "memory", "growth")
        record |= {k: v for k in optional if (v := getattr(self, k))}
        return record | {"rows": self.rows}

    def save(self, after: Noise | None = None) -> None:
        """Writes --out; without the noise afterwards, the run is not at its end."""
        if self.args.out:
            report.write_json(self.args.out, self.record(after))
        self.after = after

    def draw(self, path: Path) -> None:
        try:
            from . import plot
        except ImportError as error:
            print(f"no picture: {error}")
            return
        plot.draw(self.record(self.after), path)


def without_broken_compiled(
    variants: Sequence[Variant], note: Callable[[str], None]
) -> list[Variant]:
    """Runs what torch.compile made, and leaves out what it cannot make on this machine."""
    working = []
    for v in variants:
        if v.name.startswith("compiled"):
            try:
                with v.context():
                    for _ in range(3):  # torch's own graphs record the second and replay the third
                        v.step()
            except Exception as error:  # whatever a compiler raises that is missing or fails
                note(f"{v.name} is left out: {graphs.first_line(error)}")
                continue
        working.append(v)
    return working


def check_gradients(variants: Sequence[Variant], tolerance: float = 1e-3) -> None:
    """Raises RuntimeError where two variants that should leave the same gradients do not.

    Each gradient's difference is measured against the largest element of the first one.
    """
    comparable = [v for v in variants if v.leaves]
    expected: list[torch.Tensor] = []
    for v in comparable:
        with torch.no_grad():
            for grad in v.static_grads:  # a replay that writes nothing must not pass
                grad.fill_(torch.nan)
        with v.context():
            v.step()
        actual = [grad.flatten() for grad in v.gradients()]
        if len(actual) != len(v.leaves):
            raise RuntimeError(f"{v.name} leaves out a gradient")
        expected = expected or [grad.clone() for grad in actual]
        # A variant may have only the first of them to compare.
        for i, (a, b) in enumerate(zip(actual, expected, strict=False)):
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
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--graph", action="store_true", help="cuda: also time CUDA graphs")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.rounds is None:
        args.rounds = 7 if args.quick else 21
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    is_cuda = torch.device(args.device).type == "cuda"
    if args.graph and not is_cuda:
        parser.error(f"--graph needs --device cuda; got {args.device}")
    if is_cuda and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch {torch.__version__} finds no GPU")
    return args


def _missed(row: dict[str, Any]) -> str:
    if "exponent" in row:
        wanted = f"<= {row['at_most']}" if row["at_most"] is not None else f">= {row['at_least']}"
        return f"{row['variant']} with {row['series']}: {row['exponent']:.2f}, wanted {wanted}"
    if row.get("limit_s") is not None:
        limit = row["limit_s"]
        return f"{row['variant']} {row['median_s'] * 1e6:.1f} us, wanted {limit * 1e6:g}"
    if row.get("over_s") is not None:
        over, limit = row["over_s"] * 1e6, row["over_limit_s"] * 1e6
        return f"{row['variant']} {over:.1f} us over {report.PRODUCTS}, wanted {limit:g}"
    if "bytes" in row:
        return exact_memory.words(row)
    return f"{row['variant']} / {row['ratio_base']} {row['ratio']:.2f}, wanted {row['target']:.3g}"


def _is_source_tree() -> bool:
    return Path(snf_ext.__file__).parents[1] == Path(__file__).parents[1]


def _command(args: argparse.Namespace) -> str:
    """The command line without the folders of this machine."""
    words = ["python -m bench.compare", args.suite]
    words += [f"--{flag}" for flag in ("quick", "compile", "graph") if getattr(args, flag)]
    words += [f"--case '{args.case}'"] if args.case else []
    words += [f"--rounds {args.rounds}", f"--min-sample {args.min_sample}"]
    words += [f"--threads {args.threads}"] if args.threads else []
    words += [f"--device {args.device}"]
    words += [f"--{k} {p.name}" for k in ("out", "plot") if (p := getattr(args, k))]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
