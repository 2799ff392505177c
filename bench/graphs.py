"""Steps as CUDA graphs: captured once, replayed by a single launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from .timing import Variant

__all__ = ["capture_graph", "first_line", "graphed"]


def capture_graph(step: Callable[[], object], warm_up: int = 3) -> Callable[[], object]:
    """Captures one call of ``step`` on the current GPU; returns what replays it.

    Raises:
        RuntimeError: the step synchronises, or does something else that no graph can hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves the random state that it began with unusable, and the stream
    # changed; so it gets a copy of the one, and the other is changed back from outside.
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    try:
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                step()
            _refuse_synchronising(step)
            generator.graphsafe_set_state(generator.clone_state())
            with torch.cuda.graph(graph, stream=side):
                step()
    finally:
        generator.graphsafe_set_state(state)
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def _refuse_synchronising(step: Callable[[], object]) -> None:
    """Find out without a capture what would break one half-way."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(
    variants: Sequence[Variant],
    capture: Callable[[Callable[[], object]], Callable[[], object]] = capture_graph,
) -> tuple[list[Variant], dict[str, str]]:
    """The variants as CUDA graphs, ", graph" after their names, and why others have none.

    A step drops its gradients first, so those that the captured call left behind are the tensors
    that every replay writes to.
    """
    captured, reasons = [], {}
    for v in variants:
        if v.no_graph:
            reasons[v.name] = v.no_graph
            continue
        try:
            with v.context():
                replay = capture(v.step)
        except RuntimeError as error:
            reasons[v.name] = first_line(error)
            continue
        name, grads = f"{v.name}, graph", tuple(v.gradients())
        captured.append(dataclasses.replace(v, name=name, step=replay, static_grads=grads))
    return captured, reasons


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
