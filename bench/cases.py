"""The table of cases: shapes, and how many times faster than what the native step has to be.

A target is time(variant) / time(native) that must at least be reached; ``graph_us`` are the
microseconds that a variant may take as a CUDA graph, judged nowhere else, and ``over_us`` those
that it may take longer than the bare products. The targets are the acceptance thresholds of the
project; a row without one is there for comparison. ``rounds`` bounds how often a long step is
timed.

``flops``, ``bytes``, ``launches`` (of a GPU's kernels) and ``calls`` (of operators, one forward and
one backward) are what the step cannot do without. ``bytes`` counts every
input and every output of the two operators once: forward reads x, W, R, c and writes z, log_det,
recon; backward reads the gradients of these three, x, z, W, R, c and writes those of x, W, R, c.
``adam_bytes`` is one pass of Adam: parameter, gradient and both moments read, all but the gradient
written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "CONV",
    "LINEAR",
    "MODELS",
    "SPLINE",
    "ConvCase",
    "LinearCase",
    "ModelCase",
    "SplineCase",
    "table",
]

FLOAT = 4  # bytes


@dataclass(frozen=True)
class LinearCase:
    """One fully connected layer: forward and backward, and Adam if asked for."""

    features: int
    batch: int = 128
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    graph_us: Mapping[str, float] = field(default_factory=dict)
    over_us: Mapping[str, float] = field(default_factory=dict)
    adam: bool = False
    rounds: int | None = None

    launches: ClassVar[int] = 8  # forward 2 products, residual; backward deltas, 4 products
    calls: ClassVar[int] = 2

    @property
    def name(self) -> str:
        batch = f" batch={self.batch}" * (self.batch != 128)
        return f"D={self.features}{batch}" + " Adam" * self.adam

    @property
    def numbers(self) -> dict[str, Any]:
        return {"features": self.features, "batch": self.batch, "adam": self.adam}

    @property
    def flops(self) -> float:
        """Operations of the six products."""
        return 6 * 2 * self.batch * self.features**2

    @property
    def bytes(self) -> int:
        activations = 6 * self.batch * self.features
        return FLOAT * (activations + 6 * self.features**2 + 3 * self.features + 4 * self.batch)

    @property
    def parameters(self) -> int:
        return 2 * self.features**2 + self.features

    @property
    def adam_bytes(self) -> int:
        return 7 * FLOAT * self.parameters


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
    graph_us: Mapping[str, float] = field(default_factory=dict)
    dense_features: int = 1024  # the exact gradient by the dense matrix is timed up to this size
    rounds: int | None = None

    launches: ClassVar[int] = 3  # forward; backward, the fixed-order sum of its partial gradients
    calls: ClassVar[int] = 2

    @property
    def name(self) -> str:
        k = self.kernel
        return f"{self.channels}x{self.height}x{self.width} k={k}"

    @property
    def numbers(self) -> dict[str, Any]:
        shape = {"channels": self.channels, "height": self.height, "width": self.width}
        return {**shape, "kernel": self.kernel, "batch": self.batch}

    @property
    def features(self) -> int:
        return self.channels * self.height * self.width

    @property
    def flops(self) -> float:
        """Operations of the six convolutions, those on zero padding included."""
        return 6 * 2 * self.batch * self.features * self.channels * self.kernel**2

    @property
    def bytes(self) -> int:
        activations = 6 * self.batch * self.features
        kernels = 6 * self.channels**2 * self.kernel**2
        return FLOAT * (activations + kernels + 3 * self.channels + 4 * self.batch)

    @property
    def parameters(self) -> int:
        return 2 * self.channels**2 * self.kernel**2 + self.channels


@dataclass(frozen=True)
class SplineCase:
    """One rational-quadratic spline with parameters shared by the batch, forward and backward."""

    features: int
    bins: int
    batch: int
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True
    graph_us: Mapping[str, float] = field(default_factory=dict)

    launches: ClassVar[int] = 5  # tables, forward; tables, backward, the sum of its parts
    calls: ClassVar[int] = 2
    flops: ClassVar[float] = 0.0  # no products

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.features} bins={self.bins}"

    @property
    def parameters(self) -> int:
        return self.features * (3 * self.bins - 1)

    @property
    def bytes(self) -> int:
        """x read and y written; x and the gradient of y read and that of x written."""
        activations = 5 * self.batch * self.features
        return FLOAT * (activations + 3 * self.parameters + 2 * self.batch)


@dataclass(frozen=True)
class CouplingCase:
    """One affine coupling: its network of three convolutions, forward and backward."""

    channels: int
    height: int
    width: int
    hidden: int
    batch: int

    launches: ClassVar[int] = 11  # a convolution 3, the change of the other half 2
    calls: ClassVar[int] = 4  # the network 2, the change 2

    @property
    def _weights(self) -> int:
        first = self.channels // 2
        return 9 * first * self.hidden + self.hidden**2 + 9 * self.hidden * 2 * self._second

    @property
    def _second(self) -> int:
        return self.channels - self.channels // 2

    @property
    def flops(self) -> float:
        """Operations of three products a convolution, those on zero padding included."""
        return 3 * 2 * self.batch * self.height * self.width * self._weights

    @property
    def bytes(self) -> int:
        """x, z and their gradients; what the network gives written and read; its weights.

        Hidden channels need not be kept.
        """
        pixels = self.batch * self.height * self.width
        given = 2 * self._second
        return FLOAT * (pixels * (4 * self.channels + 2 * given) + 3 * self.parameters)

    @property
    def parameters(self) -> int:
        return self._weights + 2 * self.hidden + 2 * 2 * self._second  # biases, and last scales


@dataclass(frozen=True)
class ModelCase:
    """One training step of a model: loss, backward and Adam.

    ``model`` is "fc", linear layers, "conv", 3x3 convolutions in ``blocks`` with a squeeze between
    the blocks and a spline of 5 bins after each convolution but the last, or "glow", 1x1
    convolutions in ``blocks`` of steps, with couplings of a ``hidden`` width.
    """

    name: str
    event_shape: tuple[int, int, int]
    layers: int
    batch: int = 100
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True
    graph_us: Mapping[str, float] = field(default_factory=dict)
    model: str = "fc"
    blocks: int = 1
    hidden: int = 16

    @property
    def steps(self) -> int:
        """Layers of a block."""
        return self.layers // self.blocks

    @property
    def parts(self) -> list[LinearCase | ConvCase | SplineCase | CouplingCase]:
        """What is counted: linear layers, convolutions, splines, couplings; not the rest."""
        channels, height, width = self.event_shape
        features = math.prod(self.event_shape)
        if self.model == "fc":
            return [LinearCase(features, self.batch)] * self.layers
        if self.model == "glow":
            return self._glow_parts()
        parts: list[LinearCase | ConvCase | SplineCase | CouplingCase] = []
        for index in range(self.layers):
            scale = 2 ** (index // self.steps)
            shape = (channels * scale**2, height // scale, width // scale)
            parts.append(ConvCase(*shape, 3, self.batch))
            if index + 1 < self.layers:
                parts.append(SplineCase(features, 5, self.batch))
        return parts

    def _glow_parts(self) -> list[LinearCase | ConvCase | SplineCase | CouplingCase]:
        channels, height, width = self.event_shape
        parts: list[LinearCase | ConvCase | SplineCase | CouplingCase] = []
        for level in range(self.blocks):
            channels, height, width = 4 * channels, height // 2, width // 2
            coupling = CouplingCase(channels, height, width, self.hidden, self.batch)
            parts += [ConvCase(channels, height, width, 1, self.batch), coupling] * self.steps
            if level + 1 < self.blocks:  # the split prior
                parts.append(coupling)
                channels //= 2
        return parts

    @property
    def flops(self) -> float:
        """Operations of the six products of every layer."""
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def adam_bytes(self) -> int:
        return 7 * FLOAT * self.parameters

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts)

    @property
    def calls(self) -> int:
        return sum(part.calls for part in self.parts)


# What torch.compile makes of the merged equations must not be faster.
STOCK = {"compiled reference": 1.0}
PRODUCTS = {"products (out=)": 0.9, "products (fresh)": 0.9}

LINEAR = (
    LinearCase(32, targets={"exact": 1.0, **STOCK}, quick=True),
    LinearCase(128, targets={"exact": 1.0, **STOCK}, quick=True),
    LinearCase(800, targets={"exact": 2.0, "composed": 5.0, **STOCK}, quick=True),
    LinearCase(1568, targets={"exact": 3.0, "composed": 5.0, **PRODUCTS, **STOCK}),
    LinearCase(3104, targets={"exact": 5.5, "composed": 6.0, **PRODUCTS, **STOCK}),
)


def _conv(*shape: int, composed: float = 1.0, quick: bool = False) -> ConvCase:
    return ConvCase(*shape, targets={"composed": composed, **STOCK}, quick=quick)


CONV = (
    _conv(1, 28, 28, 3, composed=15.0, quick=True),
    _conv(4, 14, 14, 3, composed=5.5, quick=True),
    _conv(16, 7, 7, 3, composed=1.8, quick=True),
    _conv(12, 16, 16, 3, composed=2.0, quick=True),
    _conv(24, 8, 8, 3, composed=1.4),
    _conv(48, 4, 4, 3),
    _conv(64, 8, 8, 3),
    _conv(32, 16, 16, 3),
    _conv(64, 16, 16, 3),
    _conv(12, 16, 16, 1, composed=5.0, quick=True),
    _conv(24, 8, 8, 1),
    _conv(4, 14, 14, 5, composed=2.5, quick=True),
)

MODELS = (
    # The public code's base density is the D x D normal.
    ModelCase("fc 2 layers 1x28x28", (1, 28, 28), 2, targets={"composed, DxD base": 3.0, **STOCK}),
    ModelCase(
        "conv 9 layers 1x28x28",
        (1, 28, 28),
        9,
        targets={"composed, DxD base": 10.0, **STOCK},
        model="conv",
        blocks=3,
    ),
    ModelCase(
        "glow 2L-4K-16W 1x28x28",
        (1, 28, 28),
        8,
        targets={"composed, DxD base": 2.0, **STOCK},
        model="glow",
        blocks=2,
    ),
)

OTHERS = {"nflows": 15.0, "normflows": 15.0, "zuko": 5.0}

SPLINE = (
    SplineCase(784, 5, 100, targets=OTHERS),
    SplineCase(3072, 8, 128, targets=OTHERS),
)

# What torch.compile makes of the merged equations, replayed as one graph and with its own graphs.
COMPILED = {"compiled reference, graph": 1.0, "compiled reference, reduce-overhead": 1.0}


def _image(channels: int, height: int, width: int, microseconds: float) -> ConvCase:
    targets = {"composed": 10.0, **COMPILED}
    return ConvCase(
        channels, height, width, 3, 100, targets, quick=True, graph_us={"native": microseconds}
    )


def _adam(microseconds: float) -> dict[str, float]:
    """The same limit with float32 throughout and where the user allows TF32."""
    return {"native, fused Adam": microseconds, "native TF32, fused Adam": microseconds}


LINEAR_CUDA = (
    LinearCase(784, targets={"composed": 5.0, **COMPILED}, graph_us=_adam(45.0), quick=True),
    LinearCase(3104, targets=COMPILED, graph_us=_adam(250.0)),
    LinearCase(128, targets=COMPILED, quick=True),
)

CONV_CUDA = (
    _image(1, 28, 28, 10.0),
    _image(4, 14, 14, 10.0),
    _image(16, 7, 7, 10.0),
    _image(12, 16, 16, 16.0),
    _image(24, 8, 8, 16.0),
    _image(48, 4, 4, 16.0),
    ConvCase(12, 16, 16, 1, 100, targets=COMPILED),
    ConvCase(4, 14, 14, 5, 100, targets=COMPILED),
    ConvCase(64, 8, 8, 3, 100, targets=COMPILED),
)

MODELS_CUDA = (
    ModelCase("fc 2 layers 1x28x28", (1, 28, 28), 2),
    ModelCase("conv 9 layers 1x28x28", (1, 28, 28), 9, model="conv", blocks=3),
)

SPLINE_CUDA = tuple(
    SplineCase(d, k, batch, targets={"reference": 1.0, "compiled reference, graph": 1.0})
    for d, k, batch in ((784, 5, 100), (3072, 8, 128))
)


def table(suite: str, device_type: str = "cpu") -> Sequence[Any]:
    """The cases of a suite for a kind of device.

    Exact values are factorised on the CPU, and timed there alone.
    """
    from .exact_cases import EXACT, MEMORY  # made with the classes of this file, as the others
    from .figure4 import FIGURE4
    from .sampling import SAMPLING

    cuda = device_type == "cuda"
    tables: Mapping[str, Sequence[Any]] = {
        "linear": LINEAR_CUDA if cuda else LINEAR,
        "conv": CONV_CUDA if cuda else CONV,
        "models": MODELS_CUDA if cuda else MODELS,
        "spline": SPLINE_CUDA if cuda else SPLINE,
        "exact": () if cuda else (*EXACT, *MEMORY),
        "figure4": () if cuda else FIGURE4,
        "sampling": () if cuda else SAMPLING,
    }
    return tables[suite]
