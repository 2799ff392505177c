"""The one table of operators: every operator test runs over these rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ground_truth
import torch

import snf_ext


@dataclass(frozen=True)
class OpCase:
    """One operator with one set of shapes."""

    name: str
    op: str
    truth: Callable[..., ground_truth.Truth]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    weight_inv: tuple[int, ...]
    bias: bool = True
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def reconstruct(self) -> bool:
        return self.rest.get("reconstruct", True)

    @property
    def penalty_share(self) -> float:
        return self.rest.get("penalty_share", 1.0)

    @property
    def geometry(self) -> tuple:
        return tuple(self.rest[k] for k in ("dilation", "groups", "circular") if k in self.rest)

    def native(self, *args, **kwargs):
        return getattr(torch.ops.snf_ext, self.op)(*args, **self.rest, **kwargs)

    def reference(self, *args, **kwargs):
        return getattr(snf_ext.reference, self.op)(*args, **self.rest, **kwargs)

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        """x, weight, weight_inv, bias; the layer's matrices have norm about 1."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape, scale=1.0):
            values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device, dtype)

        fan_in = [max(1, torch.Size(shape[1:]).numel()) for shape in (self.weight, self.weight_inv)]
        return (
            draw(self.x),
            draw(self.weight, fan_in[0] ** -0.5),
            draw(self.weight_inv, fan_in[1] ** -0.5),
            draw(self.weight[:1]) if self.bias else None,
        )

    def gradients_of_outputs(self, dtype=torch.float64, device="cpu"):
        """Different for every sample, so that nothing can rest on equal weights."""
        batch = self.x[:-1] if self.op == "snf_linear" else self.x[:1]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(s, generator=generator) for s in (self.x, batch, batch)]
        return [g.to(device, dtype) for g in grads]


# `rule`: reconstruct and penalty_share.
def linear(name, *batch_and_features, bias=True, **rule):
    d = batch_and_features[-1]
    shapes = (batch_and_features, (d, d), (d, d))
    return OpCase(name, "snf_linear", ground_truth.linear, *shapes, bias, rule)


def conv(name, x, kernel, inverse=None, *, bias=True, dilation=1, groups=1, circular=False, **rule):
    def shape(size):
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return (x[1], x[1] // groups, rows, columns)

    return OpCase(
        name,
        "snf_conv2d",
        ground_truth.conv2d,
        x,
        shape(kernel),
        shape(inverse or kernel),
        bias,
        {"dilation": dilation, "groups": groups, "circular": circular, **rule},
    )


OPS = [
    linear("linear-one", 1, 1),
    linear("linear", 5, 7),
    linear("linear-no-bias", 3, 20, bias=False),
    linear("linear-wide", 33, 130),
    conv("conv-1x1", (3, 5, 4, 6), 1),
    # In place (csrc/cpu/conv2d_pixels.inl): no whole vectors, several runs, groups; then too small.
    conv("conv-1x1-odd-groups", (3, 6, 7, 5), 1, groups=2, bias=False),
    conv("conv-1x1-many-pixels", (2, 3, 11, 13), 1, circular=True),
    conv("conv-1x1-few-pixels", (3, 3, 3, 5), 1),
    conv("conv-3x3", (4, 3, 6, 5), 3),
    conv("conv-one-pixel", (2, 2, 1, 1), 3),
    conv("conv-one-row", (2, 3, 1, 9), 3, bias=False),
    conv("conv-one-sample-one-channel", (1, 1, 7, 4), 5),
    conv("conv-7x7-on-small", (2, 2, 4, 5), 7),
    conv("conv-rectangular", (2, 2, 5, 6), (1, 5), (3, 1)),
    conv("conv-groups", (3, 6, 4, 5), 3, groups=3),
    conv("conv-depthwise", (3, 4, 5, 4), 3, groups=4, bias=False),
    conv("conv-dilation", (2, 2, 7, 8), 3, dilation=2),
    conv("conv-circular", (3, 3, 5, 4), 3, circular=True),
    conv("conv-circular-wraps", (2, 2, 3, 2), 5, circular=True, dilation=2),
    conv("conv-dilation-beyond", (2, 2, 3, 4), 5, 3, dilation=30),
    conv("conv-circular-dilation-beyond", (2, 2, 3, 4), 5, 3, circular=True, dilation=30),
    conv("conv-circular-groups", (2, 4, 4, 6), 5, groups=2, circular=True),
    conv("conv-14-wide", (2, 2, 3, 14), 3),
    conv("conv-19-wide-circular", (2, 1, 4, 19), 3, 5, circular=True),
    conv("conv-larger-inverse", (3, 2, 6, 5), 3, 7),
    conv("conv-smaller-inverse", (3, 2, 6, 5), 5, 3, dilation=2),
    conv("conv-larger-inverse-circular", (2, 2, 4, 5), 3, 5, circular=True),
    # Enough channels for the kernels with vectors along channels (csrc/cpu/conv2d_channels.inl).
    conv("conv-channels-16", (9, 16, 3, 2), 3),
    conv("conv-channels-20", (2, 20, 2, 3), 3, 5, dilation=2),
    conv("conv-channels-24-circular", (2, 24, 3, 2), 3, circular=True),
    conv("conv-channels-48-groups", (3, 48, 2, 2), 3, groups=3, bias=False),
    conv("conv-channels-64", (1, 64, 2, 1), 3),
    conv("conv-channels-80-groups", (2, 80, 2, 2), 3, 5, groups=2),  # two panels a group
    # Too many channels for them: torch's own convolutions (csrc/cpu/conv2d_stock.cpp).
    conv("conv-channels-66", (3, 66, 2, 2), 3),
    conv("conv-channels-134-circular", (2, 134, 2, 1), 3, 5, groups=2, circular=True, dilation=2),
    # Nothing reconstructed, and shares of the penalty: each layer, each way of computing it.
    linear("linear-plain", 5, 7, reconstruct=False),
    linear("linear-share-0", 4, 9, bias=False, penalty_share=0.0),
    linear("linear-share-0.3", 5, 7, penalty_share=0.3),
    conv("conv-plain", (4, 3, 6, 5), 3, 5, reconstruct=False),
    conv(
        "conv-plain-circular-groups",
        (2, 4, 4, 5),
        5,
        3,
        groups=2,
        circular=True,
        reconstruct=False,
        penalty_share=0.3,
    ),
    conv("conv-1x1-plain", (3, 4, 5, 5), 1, 3, bias=False, reconstruct=False),
    conv("conv-1x1-share-0", (3, 4, 5, 5), 1, penalty_share=0.0),
    conv("conv-share-0", (4, 3, 6, 5), 3, penalty_share=0.0),
    conv("conv-share-0.3", (3, 2, 5, 6), 3, 5, bias=False, penalty_share=0.3),
    conv("conv-channels-16-plain", (9, 16, 3, 2), 3, 1, reconstruct=False),
    conv("conv-channels-32-groups-share-0", (3, 32, 2, 3), 3, groups=2, penalty_share=0.0),
    conv("conv-channels-16-share-0.3", (9, 16, 3, 2), 3, penalty_share=0.3),
    conv("conv-channels-66-plain", (3, 66, 2, 2), 3, 1, reconstruct=False),
    conv("conv-channels-66-share-0", (3, 66, 2, 2), 3, 1, penalty_share=0.0),
    conv("conv-channels-66-share-0.3", (3, 66, 2, 2), 3, penalty_share=0.3),
]
