"""Progress on stderr: ignite's bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from .errors import require

# Epochs of fewer steps than this get no bar of their own.
LONG_EPOCH = 50
LINES = 20


class Progress:
    """Shows a training engine's progress while the ``with`` block runs.

    Reads ``engine.state.metrics`` at the end of each epoch and ``engine.state.output``, the loss,
    after the steps.

    Args:
        engine: an ignite engine whose own handlers are attached already.
        show: False shows nothing.
    """

    def __init__(self, engine: Any, show: bool = True) -> None:
        self._bars: list[Any] = []
        if not show:
            return
        events = require("ignite.engine").Events
        if sys.stderr.isatty():
            self._attach_bars(engine, events)
        else:
            engine.add_event_handler(events.EPOCH_COMPLETED, _print_line)

    def _attach_bars(self, engine: Any, events: Any) -> None:
        require("tqdm")
        bar = require("ignite.handlers.tqdm_logger").ProgressBar
        steps = engine.state.epoch_length
        if steps >= LONG_EPOCH:
            inner = bar(persist=False, position=1, desc="Steps")
            inner.attach(
                engine,
                output_transform=lambda loss: {"loss": loss},
                event_name=events.ITERATION_COMPLETED(every=max(1, steps // 100)),
            )
            self._bars.append(inner)
        outer = bar(persist=True, position=0, desc="Epochs", bar_format=None)
        outer.attach(
            engine,
            metric_names="all",
            event_name=events.EPOCH_COMPLETED,
            closing_event_name=events.COMPLETED,
        )
        self._bars.append(outer)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for bar in self._bars:
            if bar.pbar is not None:
                bar.pbar.close()


def _print_line(engine: Any) -> None:
    state = engine.state
    every = max(1, state.max_epochs // LINES)
    if state.metrics and (state.epoch % every == 0 or state.epoch == state.max_epochs):
        figures = "  ".join(f"{name} {value:.4g}" for name, value in state.metrics.items())
        print(f"epoch {state.epoch}/{state.max_epochs}  {figures}", file=sys.stderr, flush=True)
