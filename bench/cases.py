"""The table of cases: shapes, and how many times faster than what the native step has to be.

A target is time(variant) / time(native) that must at least be reached. The targets are the
acceptance thresholds of the project's foundation; a row without one is there for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CONV", "LINEAR", "MODELS", "ConvCase", "LinearCase", "ModelCase"]


@dataclass(frozen=True)
class LinearCase:
    """One fully connected layer, forward and backward."""

    features: int
    batch: int = 128
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False

    @property
    def name(self) -> str:
        return f"D={self.features}"

    @property
    def flops(self) -> float:
        """Operations of the six products."""
        return 6 * 2 * self.batch * self.features**2


@dataclass(frozen=True)
class ConvCase:
    """One convolution, stride 1 and same size, forward and backward."""

    channels: int
    height: int
    width: int
    kernel: int
    batch: int = 128
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False

    @property
    def name(self) -> str:
        k = self.kernel
        return f"{self.channels}x{self.height}x{self.width} k={k}"

    @property
    def features(self) -> int:
        return self.channels * self.height * self.width

    @property
    def flops(self) -> float:
        """Operations of the six convolutions, those on zero padding included."""
        return 6 * 2 * self.batch * self.features * self.channels * self.kernel**2


@dataclass(frozen=True)
class ModelCase:
    """One training step of the fully connected model: loss, backward and Adam."""

    name: str
    event_shape: tuple[int, int, int]
    layers: int
    batch: int = 100
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True

    @property
    def flops(self) -> float:
        """Operations of the six products of every layer."""
        features = self.event_shape[0] * self.event_shape[1] * self.event_shape[2]
        return self.layers * 6 * 2 * self.batch * features**2


PRODUCTS = {"products (out=)": 0.85, "products (fresh)": 0.85}

LINEAR = (
    LinearCase(32, quick=True),
    LinearCase(128, targets={"exact": 1.0}, quick=True),
    LinearCase(800, targets={"exact": 2.0, **PRODUCTS}, quick=True),
    LinearCase(1568, targets={"exact": 3.0, **PRODUCTS}),
    LinearCase(3104, targets={"exact": 5.0, **PRODUCTS}),
)

CONV = (
    ConvCase(1, 28, 28, 3, targets={"composed": 8.0}, quick=True),
    ConvCase(4, 14, 14, 3, targets={"composed": 4.0}, quick=True),
    ConvCase(16, 7, 7, 3, targets={"composed": 1.3}, quick=True),
    ConvCase(12, 16, 16, 3, targets={"composed": 1.5}, quick=True),
    ConvCase(24, 8, 8, 3, targets={"composed": 1.0}),
    ConvCase(48, 4, 4, 3, targets={"composed": 1.0}),
    ConvCase(64, 8, 8, 3, targets={"composed": 1.0}),
    ConvCase(32, 16, 16, 3, targets={"composed": 1.0}),
    ConvCase(64, 16, 16, 3, targets={"composed": 1.0}),
    ConvCase(12, 16, 16, 1, targets={"composed": 3.0}, quick=True),
    ConvCase(24, 8, 8, 1, targets={"composed": 1.0}),
    ConvCase(4, 14, 14, 5, targets={"composed": 2.5}, quick=True),
)

MODELS = (
    # At most 0.4 of the public code's time, whose base density is the D x D normal.
    ModelCase("fc 2 layers 1x28x28", (1, 28, 28), 2, targets={"composed, DxD base": 2.5}),
)
