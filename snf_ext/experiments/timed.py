"""Rows that are times: of a training step, and of one sample."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from ..flow import Flow
from ..layers import ExactLinear, SelfNormLinear
from ..training.optimizers import OPTIMIZERS
from ..training.seeds import seeded
from .plan import Numbers, Place, Row, Unit

# What is timed are the operations, which are the same for any image: no data set is needed.
IMAGES: dict[str, tuple[tuple[int, int, int], int]] = {
    "mnist": ((1, 28, 28), 256),
    "cifar10": ((3, 32, 32), 256),
    "imagenet32": ((3, 32, 32), 256),
    "digits": ((1, 8, 8), 17),
}
VECTORS = "random vectors"
LINEAR: dict[str, Callable[[int], Any]] = {"self_norm": SelfNormLinear, "exact": ExactLinear}

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call], device: torch.device, count: int, warmup: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Times each call ``count`` times, a round of all after the other, each round in a new order.

    What disturbs the machine disturbs all alike. The device has finished before a call starts and
    before its clock is read. Calls of the warm-up are not counted.

    Returns:
        Median and quartiles of each in milliseconds.

    >>> times = interleave({"a": lambda: time.sleep(0.002)}, torch.device("cpu"), 3, 1)
    >>> times["a"]["q1"] <= times["a"]["median"] <= times["a"]["q3"], times["a"]["median"] >= 2
    (True, True)
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    with _undisturbed():
        for turn in range(warmup + count):
            shuffle(order)
            for name in order:
                _finish(device)
                start = time.perf_counter()
                calls[name]()
                _finish(device)
                if turn >= warmup:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _quartiles(values) for name, values in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _undisturbed() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _quartiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


@dataclass(frozen=True)
class Timed:
    """Models timed in groups: a training step each, and one sample if ``samples``.

    A step is loss, gradients, clipping where the row has it, and the optimizer, on random values.
    A sample is a batch of one by the model's own inverse, learned where it has one; factors of
    exact inverses are made in the warm-up and kept.
    """

    samples: bool
    seeded: bool = False

    def data(self, rows: Sequence[Row]) -> set[str]:
        """None."""
        return set()

    def units(self, rows: Sequence[Row], seeds: int) -> list[Unit]:
        """One a group."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        return [
            Unit(
                tuple(row.name for row in members),
                0,
                group,
                {row.name: row.flat() for row in members},
                partial(self._perform, members),
            )
            for group, members in groups.items()
        ]

    def _perform(self, rows: list[Row], folder: Path, place: Place) -> dict[str, Numbers]:
        with seeded(place.device, 0, "timing"):
            flows = {row.name: _flow(row, place) for row in rows}
            count, warmup = (rows[0].settings[name] for name in ("batches", "warmup"))
            steps = {row.name: _step(row, flows[row.name], place.device) for row in rows}
            found: dict[str, Numbers] = {name: {} for name in flows}
            began = time.perf_counter()
            for name, times in interleave(steps, place.device, count, warmup).items():
                found[name] |= _named("batch", times)
            if self.samples:
                draws: dict[str, Call] = {}
                for name, flow in flows.items():
                    draws[name] = partial(_sample, flow.eval())
                count = rows[0].settings["samples"]
                for name, times in interleave(draws, place.device, count, warmup).items():
                    found[name] |= _named("sample", times)
        seconds = time.perf_counter() - began
        return {name: {**numbers, "seconds": seconds} for name, numbers in found.items()}


def _named(what: str, times: dict[str, float]) -> Numbers:
    return {f"{what}_ms": times["median"], f"{what}_q1": times["q1"], f"{what}_q3": times["q3"]}


def _flow(row: Row, place: Place) -> Flow:
    if row.data == VECTORS:
        features = row.model_args["features"]
        flow = Flow([LINEAR[row.model_args["linear"]](features)], event_shape=(features,))
    else:
        shape, levels = IMAGES[row.data]
        settings = {"event_shape": shape, "pixel_levels": levels, **row.model_args}
        flow = place.build({"name": row.model, "settings": settings})
        flow.recon_weight = row.settings["recon_weight"]
    return flow.to(place.device)


def _step(row: Row, flow: Flow, device: torch.device) -> Call:
    settings = row.settings
    shape, clip = (settings["batch_size"], *flow.event_shape), settings.get("clip_norm")
    if row.data == VECTORS:
        x = torch.randn(shape, device=device)
    else:
        x = torch.randint(IMAGES[row.data][1], shape, device=device).float()
    optimizer = OPTIMIZERS["adam"](flow.parameters(), settings["lr"], False)
    flow.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        flow.loss(x).backward()
        if clip is not None:
            clip_grad_norm_(flow.parameters(), clip)
        optimizer.step()

    return step


@torch.no_grad()
def _sample(flow: Flow) -> None:
    flow.sample(1)
