"""A model of data-parallel training of the papers' models: ``python -m bench.scaling``.

Bytes all-reduced per step against the time to compute it, for N ranks of one GPU each and several
links: how far more GPUs pay. No measurement; what it is made of says of each number where it comes
from. Counting the models takes a minute; ``--tables FILE.json`` prints those of a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import snf_ext
from snf_ext.layers.upkeep import Tracked

from . import dispatches, report
from .cases import ModelCase
from .scaling_model import (
    BACKWARD,
    BASE_LARGE,
    BASE_SMALL,
    BASE_TREE,
    BUCKET,
    FIRST_BUCKET,
    FLOAT,
    LINKS,
    RANKS,
    REACHED,
    Facts,
    controller_seconds,
    rows,
    step_seconds,
)

MEASURED = Path(__file__).parent / "results" / "models-cuda.json"

CASES: dict[str, ModelCase] = {
    "FC 2L": ModelCase("fc 2 layers 1x28x28", (1, 28, 28), 2),
    "conv 9L": ModelCase("conv 9 layers 1x28x28", (1, 28, 28), 9, model="conv", blocks=3),
    "Glow 2L-16K, MNIST": ModelCase("", (1, 28, 28), 32, model="glow", blocks=2, hidden=512),
    "Glow 3L-32K, CIFAR-10": ModelCase("", (3, 32, 32), 96, model="glow", blocks=3, hidden=512),
    "Glow 3L-48K, ImageNet": ModelCase("", (3, 32, 32), 144, model="glow", blocks=3, hidden=512),
}

# Of the rate of large float32 products that a step of Glow is taken to compute at. Assumed.
GLOW_SHARE = 0.5


def build(case: ModelCase, inverse: str, steps: int | None = None, side: int | None = None) -> Any:
    """The model of a case; Glow perhaps with other steps, on images of another side."""
    channels, height, width = case.event_shape
    shape = (channels, side or height, side or width)
    if case.model == "fc":
        return snf_ext.models.fc(shape, case.layers, inverse=inverse)
    if case.model == "conv":
        return snf_ext.models.conv(shape, case.layers, case.blocks, inverse=inverse)
    return snf_ext.models.glow(
        shape, case.blocks, steps or case.steps, case.hidden, inverse=inverse
    )


def trained_parameters(flow: torch.nn.Module) -> int:
    """How many numbers get a gradient, which is what is all-reduced."""
    return sum(p.numel() for p in flow.parameters() if p.requires_grad)


def learned_layers(flow: torch.nn.Module) -> int:
    kinds = (snf_ext.SelfNormLinear, snf_ext.SelfNormConv2d)
    return sum(isinstance(module, kinds) for module in flow.modules())


def shown_bytes(flow: torch.nn.Module) -> list[int]:
    """Of the samples that each tracked linear layer is made right on, the same on all ranks."""
    linear = [m for m in flow.modules() if isinstance(m, snf_ext.SelfNormLinear)]
    return [FLOAT * Tracked().samples * layer.features for layer in linear]


def count_step(flow: Any) -> int:
    """Operators that a training step of a flow dispatches, fused Adam included."""
    x = torch.randint(256, (2, *flow.event_shape)).float()
    snf_ext.layers.initialize(flow.train(), [x])
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        flow.loss(x).backward()
        optimizer.step()

    return dispatches.count(step).total()


def count_dispatches(case: ModelCase) -> int:
    """With the penalty; of Glow by those with 1 and 2 steps a level, on small images."""
    if case.model != "glow":
        return count_step(build(case, "penalty"))
    side = 2 ** (case.blocks + 1)  # pixels at the last level too
    one, two = (count_step(build(case, "penalty", steps, side)) for steps in (1, 2))
    return one + (case.steps - 1) * (two - one)


def measured_steps(result: Mapping[str, Any], graph: bool = True) -> dict[str, float]:
    """Seconds of the native step with fused Adam, in one CUDA graph or eager, by case."""
    variant = "native, fused Adam" + ", graph" * graph
    return {row["case"]: row["median_s"] for row in result["rows"] if row["variant"] == variant}


def collect(result: Mapping[str, Any]) -> list[Facts]:
    """Count the models, and take their steps' times apart with what an H200 did.

    Of a measured step, what its operations do not take at the rate of large products counts as
    fixed: the most that it can be, so that split batches look no better than they are. For the
    others an operator costs as much beyond its operations as the two measured models' on average.
    """
    rate, steps = result["rates"]["float32_per_s"], measured_steps(result)
    eager_steps = measured_steps(result, graph=False)
    found: list[Facts] = []
    overheads: list[float] = []
    eager_overheads: list[float] = []
    for name, case in CASES.items():
        learned = build(case, "penalty")
        operations, count = case.flops / case.batch, count_dispatches(case)
        measured = case.name in steps
        if measured:
            image = operations / rate
            fixed = steps[case.name] - case.batch * image
            overheads.append(fixed / count)
            eager = eager_steps[case.name]
            eager_overheads.append(eager / count)
        else:
            image = operations / (GLOW_SHARE * rate)
            fixed = count * sum(overheads) / len(overheads)
            eager = count * sum(eager_overheads) / len(eager_overheads)
        found.append(
            Facts(
                model=name,
                batch=case.batch,
                tracked=trained_parameters(build(case, "tracked")),
                penalty=trained_parameters(learned),
                learned=learned_layers(learned),
                operations=operations,
                dispatches=count,
                fixed_s=fixed,
                image_s=image,
                eager_s=eager,
                shown=shown_bytes(learned),
                measured=measured,
            )
        )
    return found


def facts_of(result: Mapping[str, Any]) -> list[Facts]:
    return [Facts(**facts) for facts in result["models"]]


def facts_table(result: Mapping[str, Any]) -> str:
    """What is counted, and a step of the paper's batch on one GPU."""
    lines = [
        "| model | parameters, tracked | with penalty | MB a step, tracked | with penalty | "
        "Gflop an image | step, ms | of which fixed | |",
        "|---" * 9 + "|",
    ]
    for f in facts_of(result):
        cells = [f.model, f"{f.tracked:,}", f"{f.penalty:,}"]
        cells += [f"{FLOAT * n / 1e6:.3g}" for n in (f.tracked, f.penalty)]
        cells += [f"{f.operations / 1e9:.3g}", f"{1e3 * f.compute_s(f.batch):.3g}"]
        cells += [f"{1e3 * f.fixed_s:.3g}", "measured" if f.measured else "modelled"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def efficiency_table(result: Mapping[str, Any], weak: bool) -> str:
    """Efficiency in turn / overlapped, with tracked inverses; by model, link and N."""
    at = {
        (r["model"], r["link"], r["ranks"]): r
        for r in result["rows"]
        if r["weak"] == weak and r["inverse"] == "tracked"
    }
    shown = RANKS[1:]
    lines = ["| model | link | " + " | ".join(f"N = {n}" for n in shown) + " |"]
    lines.append("|---" * (len(shown) + 2) + "|")
    for facts in facts_of(result):
        for link in LINKS:
            cells = [facts.model, link.name]
            for n in shown:
                r = at.get((facts.model, link.name, n))
                cells.append(
                    ""
                    if r is None
                    else " / ".join(_two(r[f"{k}_efficiency"]) for k in ("in_turn", "overlapped"))
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _two(share: float) -> str:
    return f"{share:.2f}" if share >= 0.095 else f"{share:.1g}"


def speed_table(result: Mapping[str, Any]) -> str:
    """The most that a split batch gains: how many times faster, and at which N."""
    lines = ["| model | " + " | ".join(link.name for link in LINKS) + " |"]
    lines.append("|---" * (len(LINKS) + 1) + "|")
    for facts in facts_of(result):
        cells = [facts.model]
        for link in LINKS:
            chosen = [
                (r["ranks"] * r["overlapped_efficiency"], -r["ranks"])
                for r in result["rows"]
                if (r["model"], r["link"]) == (facts.model, link.name)
                and r["inverse"] == "tracked"
                and not r["weak"]
            ]
            gain, ranks = max(chosen)
            cells.append("none" if ranks == -1 else f"{gain:.1f} at N = {-ranks}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def eager_table(result: Mapping[str, Any]) -> str:
    """One GPU that replays graphs beside ranks that do not, overlapped, tracked inverses."""
    shown = [(link, weak) for weak in (True, False) for link in (LINKS[0], LINKS[2])]
    lines = [
        "| model | step replayed, ms | eager, ms | "
        + " | ".join(f"{'same batch' if weak else 'split'}, {link.name}" for link, weak in shown)
        + " |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for facts in facts_of(result):
        alone = facts.compute_s(facts.batch)
        cells = [facts.model, f"{1e3 * alone:.3g}", f"{1e3 * facts.eager_s:.3g}"]
        for link, weak in shown:
            seconds = step_seconds(facts, 8, link, weak=weak, overlap=True, replayed=False)
            cells.append(f"{alone / seconds * (8 if weak else 1):.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def controllers_table(result: Mapping[str, Any]) -> str:
    """Milliseconds a step that controllers add, by link and N."""
    shown = [(link, n) for link in LINKS for n in (8, 64) if n <= link.most]
    lines = ["| model | layers | " + " | ".join(f"{a.name}, N = {n}" for a, n in shown) + " |"]
    lines.append("|---" * (len(shown) + 2) + "|")
    for facts in facts_of(result):
        cells = [facts.model, str(facts.learned)]
        cells += [f"{1e3 * controller_seconds(facts, n, link):.2g}" for link, n in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result: Mapping[str, Any]) -> list[str]:
    return [
        facts_table(result),
        efficiency_table(result, weak=True),
        efficiency_table(result, weak=False),
        speed_table(result),
        eager_table(result),
        controllers_table(result),
    ]


def make(command: str) -> dict[str, Any]:
    """The whole result."""
    source = json.loads(MEASURED.read_text(encoding="utf-8"))
    models = collect(source)
    return {
        "suite": "scaling-model",
        "environment": report.environment(command),
        "measured": {
            "file": MEASURED.name,
            "gpu": source["environment"]["gpu"],
            "float32_per_s": source["rates"]["float32_per_s"],
            "steps_s": measured_steps(source),
            "eager_steps_s": measured_steps(source, graph=False),
        },
        "assumed": {
            "glow_share": GLOW_SHARE,
            "reached": REACHED,
            "buckets": [FIRST_BUCKET, BUCKET],
            "backward": BACKWARD,
            "bases_s": [BASE_SMALL, BASE_LARGE, BASE_TREE],
            "links": [asdict(link) for link in LINKS],
        },
        "models": [asdict(facts) for facts in models],
        "rows": list(rows(models)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--tables", type=Path, help="print the tables of this result instead")
    args = parser.parse_args(arguments)
    if args.tables:
        result = json.loads(args.tables.read_text(encoding="utf-8"))
    else:
        result = make("python -m bench.scaling")
        if args.out:
            report.write_json(args.out, result)
    print("\n\n".join(tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
