"""The table of exact values of convolutions, in time and in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from snf_ext.exact import Plan, plan_conv2d

__all__ = ["EXACT", "MEMORY", "ExactCase", "MemoryCase"]


@dataclass(frozen=True)
class ExactCase:
    """Exact values of one convolution in float64.

    ``operation`` is what is timed: "log-det" (of a fresh weight), "log-det + gradient", "solve"
    (100 right-hand sides, factorised before) or "factorise + solve". ``away`` says that the weight
    is not one that models start with, but far from the identity, where a fixed point of the
    elimination is reached late.
    """

    operation: str
    channels: int
    height: int
    width: int
    kernel: int = 3
    dilation: int = 1
    groups: int = 1
    circular: bool = False
    away: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    graph_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        words = [f"{self.channels}x{self.height}x{self.width} k={self.kernel}"]
        words += [f"dilation={self.dilation}"] * (self.dilation > 1)
        words += [f"groups={self.groups}"] * (self.groups > 1)
        words += ["circular"] * self.circular
        return " ".join(words)

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}" + " away" * self.away

    @property
    def features(self) -> int:
        return self.channels * self.height * self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.channels, self.channels // self.groups, self.kernel, self.kernel)

    @property
    def geometry(self) -> tuple[tuple[int, int], int, int, bool]:
        """What the functions of ``snf_ext.exact`` take after the weight."""
        return ((self.height, self.width), self.dilation, self.groups, self.circular)

    @property
    def plan(self) -> Plan:
        return plan_conv2d(self.weight_shape, *self.geometry)

    @property
    def flops(self) -> float:
        """Of the plan, which are the most it can take; solutions are not counted."""
        times = {"log-det": 1.0, "log-det + gradient": 2.5}
        return times.get(self.operation, 0) * self.plan.operations


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory of an exact case, by the "package" or "dense"."""

    exact: ExactCase
    variant: str
    limit: int | None = None  # bytes
    quick: bool = False

    @property
    def name(self) -> str:
        return f"memory of {self.exact.name}, {self.variant}"


# Ratios of the dense way that have to be reached, by operation and shape.
_EXACT_TARGETS = {
    ("log-det", "1x28x28 k=3"): 10.0,
    ("log-det", "16x7x7 k=3"): 3.0,
    ("log-det + gradient", "1x28x28 k=3"): 10.0,
    ("log-det + gradient", "16x7x7 k=3"): 5.0,
    ("log-det + gradient", "12x16x16 k=3"): 15.0,
}


def _exact(operation: str, away: bool, *shape: int, **options: int) -> ExactCase:
    quick = math.prod(shape[:3]) < 1000 and not away
    case = ExactCase(operation, *shape, **options, away=away, quick=quick)
    target = _EXACT_TARGETS.get((operation, case.shape))
    return case if target is None else replace(case, targets={"dense": target})


EXACT = tuple(
    _exact(operation, away, *shape, **options)
    for shape, options in (
        ((1, 28, 28), {}),
        ((4, 14, 14), {}),
        ((16, 7, 7), {}),
        ((12, 16, 16), {}),
        ((24, 8, 8), {}),
        ((48, 4, 4), {}),
        ((3, 32, 32), {}),
        ((3, 64, 64), {}),
        ((2, 16, 32), {}),
        ((4, 14, 14, 5), {}),
        ((4, 14, 14), {"dilation": 2}),
        ((24, 8, 8), {"groups": 4}),
        ((12, 16, 16), {"circular": True}),
    )
    for away in (False, True)
    for operation in ("log-det", "log-det + gradient", "solve", "factorise + solve")
)

MEMORY = tuple(
    MemoryCase(ExactCase(operation, 3, size, size, away=True), variant, limit)  # keeps more
    for size, variant, limit in (
        (64, "package", 300_000_000),
        (32, "package", None),
        (32, "dense", None),
    )
    for operation in ("log-det + gradient", "factorise + solve")
)
