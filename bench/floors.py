"""The floors that a time is judged by: operations, bytes and launches over what the device can do.

``python -m bench.compare --device cuda`` measures the rates and prints the floor beside each time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from .cases import ConvCase, LinearCase, ModelCase
from .timing import product_step, sample

__all__ = ["FORMULA", "Floor", "Rates", "allow_tf32", "copy_bandwidth", "floor", "measure"]

LAUNCH = 2e-6  # seconds of one small dependent kernel in a replayed CUDA graph
ADAM_LAUNCHES = 2  # fused Adam: count the step, update

FORMULA = (
    "floor = max(operations / rate, bytes / copy bandwidth, launches * 2 us); operations: the six "
    "products, at the float32 rate, with TF32 four of them at its rate; bytes: each input and each "
    "output of the forward and of the backward operator once, with Adam 7 numbers a parameter "
    "more; launches: of the native step (convolution 3, spline 3, linear 8, Adam 2)"
)


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do: operations and bytes a second."""

    float32: float
    tf32: float
    copy: float

    def __str__(self) -> str:
        return (
            f"float32 {self.float32 / 1e12:.1f} TFLOP/s, TF32 {self.tf32 / 1e12:.1f} TFLOP/s, "
            f"copy {self.copy / 1e12:.2f} TB/s (read and written)"
        )

    def record(self) -> dict[str, float]:
        return {f"{name}_per_s": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least, by each of the three."""

    operations: float
    bytes: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.operations, self.bytes, self.launches)


def floor(
    case: LinearCase | ConvCase | ModelCase,
    rates: Rates,
    *,
    adam: bool = False,
    tf32: bool = False,
) -> Floor:
    """The floor of one step of a case; see ``FORMULA``. z and the residual are never TF32."""
    operations = case.flops / rates.float32
    if tf32:
        operations = operations / 3 + 2 / 3 * case.flops / rates.tf32
    moved, launches = case.bytes, case.launches
    if adam and not isinstance(case, ConvCase):
        moved, launches = moved + case.adam_bytes, launches + ADAM_LAUNCHES
    return Floor(operations, moved / rates.copy, launches * LAUNCH)


@contextlib.contextmanager
def allow_tf32() -> Iterator[None]:
    """Products of the block may round their inputs to TF32, as the user's setting allows."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_bandwidth(device: torch.device | str, size: int = 2**29) -> float:
    """Bytes read and written a second, copying ``size`` bytes: far more than a cache holds."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(sample(lambda: target.copy_(source), device))


def measure(device: torch.device | str, float32: float) -> Rates:
    """The rates of a GPU whose float32 products were seen to run at ``float32``."""
    with allow_tf32():
        seconds = statistics.median(sample(product_step(device, 4096), device))
    return Rates(float32, 2 * 4096**3 / seconds, copy_bandwidth(device))
