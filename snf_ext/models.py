"""The papers' architectures, on raw images."""

from __future__ import annotations

import math
from collections.abc import Callable

from .bijection import Bijection
from .flow import Flow
from .layers import (
    Dequantize,
    ExactLinear,
    Flatten,
    Logit,
    Normalize,
    SelfNormLinear,
    SmoothLeakyReLU,
)

LINEAR: dict[str, Callable[[int], Bijection]] = {
    "self_norm": SelfNormLinear,
    "exact": ExactLinear,
}


def fc(
    event_shape: tuple[int, ...] = (1, 28, 28),
    layers: int = 2,
    linear: str = "self_norm",
    *,
    pixel_levels: int = 256,
    recon_weight: float = 1.0,
) -> Flow:
    """The fully connected flow: linear layers with smooth leaky ReLU (0.3) between them.

    On raw images of values 0..pixel_levels-1: dequantization, scaling and logit are inside, and
    their Jacobian is counted.

    Args:
        event_shape: of one image.
        layers: number of linear layers.
        linear: ``"self_norm"`` or ``"exact"``.
        pixel_levels: number of values a pixel can take.
        recon_weight: lambda.

    Raises:
        ValueError: an unknown ``linear``, or fewer than one layer.

    Source: SNF A.3, "2L FC": 2,460,192 parameters on MNIST.

    >>> sum(p.numel() for p in fc().parameters())
    2460192
    """
    if linear not in LINEAR:
        raise ValueError(f"linear must be one of {', '.join(LINEAR)}; got {linear!r}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1; got {layers}")
    features = math.prod(event_shape)
    bijections = [*preprocessing(pixel_levels), Flatten(event_shape)]
    for index in range(layers):
        if index:
            bijections.append(SmoothLeakyReLU(0.3))
        bijections.append(LINEAR[linear](features))
    return Flow(bijections, event_shape, recon_weight)


def preprocessing(pixel_levels: int = 256) -> list[Bijection]:
    """Uniform dequantization, scaling to [0, 1], logit with a = 1e-6 (SNF A.3)."""
    return [Dequantize(pixel_levels), Normalize(0.0, pixel_levels), Logit(1e-6)]
