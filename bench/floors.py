"""The floors that a time is judged by: operations, bytes and launches over what the device can do.

``python -m bench.compare`` measures the rates and prints the floor beside each time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from .cases import ConvCase, LinearCase, ModelCase, SplineCase
from .timing import product_step, sample

__all__ = [
    "CPU_FORMULA",
    "FORMULA",
    "Floor",
    "Rates",
    "allow_tf32",
    "copy_bandwidth",
    "dispatch",
    "floor",
    "measure",
    "measure_cpu",
]

LAUNCH = 2e-6  # seconds of one small dependent kernel in a replayed CUDA graph
ADAM_LAUNCHES = 2  # fused Adam: count the step, update
ADAM_CALLS = 1

FORMULA = (
    "floor = max(operations / rate, bytes / copy bandwidth, launches * 2 us); operations: the six "
    "products, at the float32 rate, with TF32 four of them at its rate; bytes: each input and each "
    "output of the forward and of the backward operator once, with Adam 7 numbers a parameter "
    "more; launches: of the native step (convolution 3, spline 3, linear 8, Adam 2)"
)
CPU_FORMULA = (
    "floor = max(operations / rate, bytes / copy bandwidth, calls * dispatch); operations: the six "
    "products, at the rate of the fastest of several sizes; bytes: each input and each output of "
    "the forward and of the backward operator once, with Adam 7 numbers a parameter more, at the "
    "bandwidth of the fastest copy that moves at least as many, caches included; calls: one "
    "operator forward and one backward a layer, one for Adam, at the time of the smallest one; of "
    "samples one product and one operator a layer"
)

PRODUCT_SIZES = (512, 1024, 2048)
COPY_SIZES = tuple(2**n for n in range(16, 29, 2))  # bytes read: 64 KiB, in a cache, to 256 MiB


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do: operations and bytes a second, and a launch.

    ``copies`` are pairs of bytes moved and the rate of such a copy, small ones first: a CPU moves
    what its caches hold several times as fast. Empty on a GPU, where ``copy`` says it all.
    """

    float32: float
    tf32: float
    copy: float
    launch: float = LAUNCH
    copies: tuple[tuple[int, float], ...] = ()

    @property
    def gpu(self) -> bool:
        return not self.copies

    @property
    def formula(self) -> str:
        return FORMULA if self.gpu else CPU_FORMULA

    def __str__(self) -> str:
        if self.gpu:
            return (
                f"float32 {self.float32 / 1e12:.1f} TFLOP/s, TF32 {self.tf32 / 1e12:.1f} TFLOP/s, "
                f"copy {self.copy / 1e12:.2f} TB/s (read and written)"
            )
        cached = ", ".join(f"{r / 1e9:.0f} of {n / 1e6:.2g} MB" for n, r in self.copies)
        return (
            f"float32 {self.float32 / 1e9:.0f} GFLOP/s, copy {self.copy / 1e9:.1f} GB/s (read and "
            f"written; {cached}), dispatch {self.launch * 1e6:.2f} us"
        )

    def bandwidth(self, moved: float) -> float:
        """Bytes a second of the fastest copy that moves at least ``moved``."""
        return max((rate for size, rate in self.copies if size >= moved), default=self.copy)

    def record(self) -> dict[str, object]:
        record: dict[str, object] = {
            f"{name}_per_s": asdict(self)[name] for name in ("float32", "tf32", "copy")
        }
        if self.gpu:
            return record
        del record["tf32_per_s"]
        return record | {"copies_per_s": dict(self.copies), "dispatch_s": self.launch}


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
    case: LinearCase | ConvCase | SplineCase | ModelCase,
    rates: Rates,
    *,
    adam: bool = False,
    tf32: bool = False,
) -> Floor:
    """The floor of one step of a case; see ``FORMULA``. z and the residual are never TF32."""
    operations = case.flops / rates.float32
    if tf32:
        operations = operations / 3 + 2 / 3 * case.flops / rates.tf32
    moved, launches = case.bytes, case.launches if rates.gpu else case.calls
    if adam and isinstance(case, LinearCase | ModelCase):
        moved += case.adam_bytes
        launches += ADAM_LAUNCHES if rates.gpu else ADAM_CALLS
    return Floor(operations, moved / rates.bandwidth(moved), launches * rates.launch)


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
    """Bytes read and written a second, copying ``size`` bytes: by default more than a cache."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(sample(lambda: target.copy_(source), device))


def dispatch(calls: int = 1000) -> float:
    """Seconds of one of torch's operators on the CPU that has next to nothing to do."""
    x = torch.zeros(1)

    def run() -> None:
        for _ in range(calls):
            x.neg_()

    return min(sample(run)) / calls


def measure(device: torch.device | str, float32: float) -> Rates:
    """The rates of a GPU whose float32 products were seen to run at ``float32``."""
    with allow_tf32():
        seconds = statistics.median(sample(product_step(device, 4096), device))
    return Rates(float32, 2 * 4096**3 / seconds, copy_bandwidth(device))


def measure_cpu(float32: float, samples: int = 10) -> Rates:
    """The rates of the CPU with torch's present threads.

    Args:
        float32: at which 1024^3 products were seen to run.
        samples: of each size of product.
    """
    for size in PRODUCT_SIZES:
        seconds = statistics.median(sample(product_step("cpu", size), samples=samples))
        float32 = max(float32, 2 * size**3 / seconds)
    copies = tuple((2 * size, copy_bandwidth("cpu", size)) for size in COPY_SIZES)
    return Rates(float32, float32, copies[-1][1], dispatch(), copies)
