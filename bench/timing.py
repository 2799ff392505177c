"""Times several variants of one step interleaved, so that a busy machine disturbs all alike."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "Noise",
    "Timing",
    "Variant",
    "calibrate",
    "interleave",
    "machine_noise",
    "product_step",
    "quartiles",
    "sample",
    "synchronise",
]


@dataclass(frozen=True)
class Variant:
    """One way of doing a step.

    ``context`` is entered around the timed calls, not inside them. ``leaves`` are tensors whose
    gradients the step leaves behind, in the same order for all variants of a case, so that they can
    be compared; empty where the variant computes something else. The replay of a CUDA graph always
    writes to the same ``static_grads``. ``no_graph`` says why no CUDA graph of the step is to be
    tried; ``adam`` and ``tf32``, whether the step ends with Adam and may round to TF32, are for its
    floor.
    """

    name: str
    step: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    leaves: tuple[Tensor, ...] = ()
    static_grads: tuple[Tensor, ...] = ()
    no_graph: str = ""
    adam: bool = False
    tf32: bool = False

    def gradients(self) -> list[Tensor]:
        """What the last step left behind, leaf by leaf; short where it left one out."""
        if self.static_grads:
            return list(self.static_grads)
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]


@dataclass
class Timing:
    """Seconds per call of one variant, one number a round."""

    name: str
    inner: int
    seconds: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        return quartiles(self.seconds)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Quartiles of this time over the other's, paired by round: drift cancels."""
        return quartiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Quartiles of this time less the other's, paired in the same way."""
        return quartiles([a - b for a, b in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Noise:
    """How fast and how steady a size x size x size float32 product runs on the whole device."""

    median: float
    fastest: float
    slowest: float
    size: int = 1024

    @property
    def rate(self) -> float:
        """Floating-point operations per second at the median."""
        return 2 * self.size**3 / self.median

    def __str__(self) -> str:
        return (
            f"{self.size}^3 product: median {self.median * 1e3:.2f} ms "
            f"({self.rate / 1e9:.0f} GFLOP/s), fastest {self.fastest * 1e3:.2f}, "
            f"slowest {self.slowest * 1e3:.2f} ({self.slowest / self.fastest:.2f} times)"
        )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def synchronise(device: torch.device | str) -> Callable[[], None]:
    """What to call inside the timed region so that the device has finished."""
    device = torch.device(device)
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _time(step: Callable[[], object], inner: int, sync: Callable[[], None]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(inner):
        step()
    sync()
    return (time.perf_counter() - start) / inner


def calibrate(
    step: Callable[[], object], sync: Callable[[], None], min_sample: float, warm_up: float = 0.1
) -> int:
    """Warms up, then says how many calls make a sample of at least ``min_sample`` seconds."""
    times = [_time(step, 1, sync) for _ in range(3)]
    start = time.perf_counter() - sum(times)
    while time.perf_counter() - start < warm_up:
        times.append(_time(step, 1, sync))
    return max(1, math.ceil(min_sample / statistics.median(times[-5:])))


def interleave(
    variants: Sequence[Variant],
    *,
    rounds: int = 21,
    min_sample: float = 0.02,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times every variant once a round, in an order shuffled anew each round from a fixed seed.

    One sample of a variant is as many calls as last ``min_sample`` seconds. The garbage collector
    runs between rounds only.
    """
    sync = synchronise(device)
    timings = {}
    for v in variants:
        with v.context():
            timings[v.name] = Timing(v.name, calibrate(v.step, sync, min_sample))

    shuffled = list(variants)
    order = random.Random(seed)
    for _ in range(rounds):
        order.shuffle(shuffled)
        gc.collect()
        gc.disable()
        try:
            for v in shuffled:
                with v.context():
                    timing = timings[v.name]
                    if timing.inner > 1:  # a short step: warm the caches that the others emptied
                        v.step()
                    timing.seconds.append(_time(v.step, timing.inner, sync))
        finally:
            gc.enable()
    return timings


def product_step(device: torch.device | str = "cpu", size: int = 1024) -> Callable[[], Tensor]:
    """The yardstick: one size^3 float32 product into memory that is already there."""
    a, b, out = torch.randn(3, size, size, device=device).unbind()
    return lambda: torch.mm(a, b, out=out)


def machine_noise(device: torch.device | str = "cpu", samples: int = 30) -> Noise:
    """Times the yardstick on its own: 1024^3 on the CPU, 4096^3 elsewhere, to fill the device."""
    size = 1024 if torch.device(device).type == "cpu" else 4096
    times = sample(product_step(device, size), device, samples)
    return Noise(statistics.median(times), min(times), max(times), size)


def sample(
    step: Callable[[], object], device: torch.device | str = "cpu", samples: int = 30
) -> list[float]:
    """Warms a step up and times it call by call, in seconds."""
    sync = synchronise(device)
    calibrate(step, sync, 0.0)
    return [_time(step, 1, sync) for _ in range(samples)]
