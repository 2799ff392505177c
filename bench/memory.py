"""The memory of a training step: what the forward pass leaves for backward, and the peak.

    python -m bench.memory [--quick] [--case TEXT] [--device cuda] [--out FILE]

A step is loss and backward from empty gradients, these included; parameters and the batch are not
counted, nor an optimizer, which is the same for all. Three numbers a variant:

- saved: bytes of tensors that are alive after the forward pass, for backward to use;
- peak: the most bytes of tensors that are alive at once (``live_bytes``);
- process: what the resident memory of a process of its own, on one thread, grows by at its peak, so
  that kernels' workspaces, pools and what an allocator does not give back are in. Linux only, read
  from VmHWM; pages of code are in, and what a step on 8x8 images keeps is not. Not taken of the
  reference.

Figures do not depend on how busy the machine is. ``limit`` is the share of the composition's peak
that may be reached.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import snf_ext

from . import report
from .cases import MODELS, ModelCase
from .composition import ComposedConv2d, composed_backward
from .live_bytes import watch
from .models import composed_like, make_flow
from .steps import backends
from .timing import Variant

__all__ = ["CASES", "Case", "Step", "build", "count", "measure", "memory_variants", "names"]

_T = TypeVar("_T")

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Shares of the composition's peak.
LIMITS = {"native": 0.5, "native, reversible": 0.25}


@dataclass(frozen=True)
class Case:
    """A model, made from the shape of an image, and a batch.

    ``like`` is the composition's case of the same model, where there is one.
    """

    name: str
    make: Callable[[tuple[int, int, int]], snf_ext.Flow]
    event_shape: tuple[int, int, int]
    batch: int
    like: ModelCase | None = None
    quick: bool = True
    flops: float = 0.0  # nothing is timed against products


def _same(case: ModelCase) -> Case:
    def make(event_shape: tuple[int, int, int]) -> snf_ext.Flow:
        return make_flow(replace(case, event_shape=event_shape))

    return Case(case.name, make, case.event_shape, case.batch, case)


CASES = (
    *map(_same, MODELS),
    Case(
        "glow 3 levels 8 steps width 64 3x32x32",
        lambda shape: snf_ext.models.glow(shape, 3, 8, 64),
        (3, 32, 32),
        16,
        quick=False,
    ),
)


@dataclass(frozen=True)
class Step:
    """One way to do a case's step: ``forward`` gives the loss, ``backward`` takes it."""

    name: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    backend: str | None = None

    def context(self) -> contextlib.AbstractContextManager[object]:
        return snf_ext.use_backend(self.backend) if self.backend else contextlib.nullcontext()

    def run(self, x: Tensor) -> None:
        """From empty gradients."""
        self.model.zero_grad()
        self.backward(self.forward(x))


def names(case: Case, device: torch.device | str = "cpu") -> list[str]:
    """Of the ways to do a case's step."""
    ours = [name for b in backends(device) for name in (b, f"{b}, reversible")]
    return [*ours, "composed"] if case.like is not None else ours


def build(
    case: Case,
    name: str,
    device: torch.device | str = "cpu",
    event_shape: tuple[int, int, int] | None = None,
) -> Step:
    """One of them, always from the same numbers; on other images if ``event_shape`` says so."""
    shape = event_shape or case.event_shape
    torch.manual_seed(0)
    flow = case.make(shape).to(device).train()
    if name == "composed" and case.like is not None:
        return _composed(flow, replace(case.like, event_shape=shape))
    backend, _, mode = name.partition(", ")
    flow.reversible = snf_ext.Reversible() if mode else None
    return Step(name, flow, flow.loss, lambda loss: loss.backward(), backend)


def _composed(flow: snf_ext.Flow, case: ModelCase) -> Step:
    composed = composed_like(flow, case).train()
    layers = [m for m in composed.modules() if isinstance(m, ComposedConv2d)]

    def forward(x: Tensor) -> Tensor:
        return -composed._log_prob(x, exact=False).sum() / len(x)

    def backward(loss: Tensor) -> None:
        composed_backward(loss, layers, composed.recon_weight)

    return Step("composed", composed, forward, backward)


def images(case: Case, batch: int, event_shape: tuple[int, int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *(event_shape or case.event_shape))
    return torch.randint(1, 255, shape, generator=generator).float()


def memory_variants(
    case: Case, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """The steps, for a stopwatch."""
    x = images(case, case.batch).to(device)
    made = [build(case, name, device) for name in names(case, device)]
    return [Variant(step.name, partial(step.run, x), step.context) for step in made]


def count(case: Case, name: str, device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes saved for backward, and at the peak of a step.

    A step on two samples goes before, which starts actnorm and fills caches.
    """
    step, x = build(case, name, device), images(case, case.batch).to(device)
    with step.context():
        step.run(x[:2])
        step.model.zero_grad()
        with watch(device) as counted:
            loss = step.forward(x)
            saved = counted().now - loss.nbytes
            step.backward(loss)
            peak = counted().peak
    return {"saved_bytes": saved, "peak_bytes": peak}


def process_growth(case: Case, name: str) -> int:
    """Bytes by which this process grows at its peak in one step, after some on smaller images."""
    torch.set_num_threads(1)
    small = (case.event_shape[0], 8, 8)
    first, step = build(case, name, event_shape=small), build(case, name)
    x = images(case, case.batch)
    with step.context():
        first.run(images(case, 2, small))
        first.model.zero_grad()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc gives back what is free
        RESET.write_text("5")  # VmHWM starts anew
        before = _resident("VmRSS")
        step.run(x)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _in_child(function: Callable[..., _T], *arguments: Any) -> _T:
    """Of a process that has only imported what is needed, like this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _process_growth(name: str, variant: str) -> int:
    return process_growth(next(c for c in CASES if c.name == name), variant)


def measure(case: Case, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """One row a variant; shares of the composition's where there is one."""
    grown: dict[str, int] = {}
    if torch.device(device).type == "cpu" and RESET.exists():
        # First, while this process has done nothing that a child would inherit.
        ours = [name for name in names(case) if not name.startswith("reference")]
        grown = {name: _in_child(_process_growth, case.name, name) for name in ours}
    rows: list[dict[str, Any]] = []
    for name in names(case, device):
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "variant": name}
        row |= count(case, name, device)
        row["parameter_bytes"] = sum(p.nbytes for p in case.make(case.event_shape).parameters())
        row["process_bytes"] = grown.get(name)
        rows.append(row)
    composed = next((r for r in rows if r["variant"] == "composed"), None)
    for row in rows:
        share = None if composed is None else row["peak_bytes"] / composed["peak_bytes"]
        limit = LIMITS.get(row["variant"]) if composed and case.name.startswith("conv") else None
        met = None if limit is None or share is None else share <= limit
        row |= {"share_of_composed": share, "limit": limit, "met": met}
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    name = rows[0]["case"]
    width = max(26, len(name) + 2)
    print(f"{name:<{width}}{'saved MB':>10}{'peak MB':>10}{'process MB':>12}  / composed  limit")
    for r in rows:
        process = "" if r["process_bytes"] is None else f"{r['process_bytes'] / 1e6:.1f}"
        share = "" if r["share_of_composed"] is None else f"{r['share_of_composed']:.3f}"
        limit = "" if r["limit"] is None else f"<= {r['limit']} {'met' if r['met'] else 'NOT MET'}"
        line = f"  {r['variant']:<{width - 2}}{r['saved_bytes'] / 1e6:>10.2f}"
        line += f"{r['peak_bytes'] / 1e6:>10.2f}{process:>12}{share:>12}  {limit}"
        print(line.rstrip())
    print(flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("--quick", action="store_true", help="only the short cases")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(arguments)
    chosen = [c for c in CASES if args.case in c.name and (c.quick or not args.quick)]
    if not chosen:
        parser.error(f"no case has {args.case!r} in its name")
    torch.set_num_threads(1)
    command = " ".join(
        ["python -m bench.memory", *(sys.argv[1:] if arguments is None else arguments)]
    )
    environment = report.environment(command, args.device)
    record: dict[str, Any] = {"suite": "memory", "environment": environment, "rows": []}
    for case in chosen:
        rows = measure(case, args.device)
        print_rows(rows)
        record["rows"] += rows
        if args.out:
            report.write_json(args.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
