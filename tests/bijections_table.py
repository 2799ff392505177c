"""The one table of bijections: every bijection test runs over these rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import snf_ext
from snf_ext import Bijection


class Residual(nn.Module):
    """``x + sign * B tanh(A x + a)``, a bijection for small weights; sign -1 nearly inverts it."""

    def __init__(self, shape: tuple[int, ...], width: int, sign: float) -> None:
        super().__init__()
        size = math.prod(shape)
        self.into, self.out = nn.Linear(size, width), nn.Linear(width, size)
        self.sign = sign
        with torch.no_grad():
            for layer in (self.into, self.out):
                layer.weight.copy_(
                    torch.linspace(-0.3, 0.3, size * width).sin().view_as(layer.weight)
                )

    def forward(self, x):
        change = self.out(torch.tanh(self.into(x.flatten(1))))
        return x + self.sign * change.view_as(x)


def residual_pair(shape: tuple[int, ...], **settings) -> Bijection:
    """Two of them, the second about the inverse of the first."""
    return snf_ext.SelfNormBijection(
        Residual(shape, 4, 1.0), Residual(shape, 4, -1.0), shape, **settings
    )


@dataclass(frozen=True)
class BijectionCase:
    """How to make one bijection, and the events it takes."""

    name: str
    make: Callable[[], Bijection]
    event_shape: tuple[int, ...]
    unit_interval: bool = False  # takes data in [0, 1]
    learned: bool = False  # has a learned inverse, and a log_det of value 0 in training
    surrogate: bool = False  # without one, yet its log_det in training has the value 0
    noisy: bool = False  # forward draws noise
    batch_dependent: bool = False  # forward in training mode depends on the whole batch
    context_shape: tuple[int, ...] | None = None  # of one sample

    def build(self, dtype=torch.float64, device="cpu") -> Bijection:
        """With weights a little off where they start, so that no test rests on the identity.

        Two batches go through first, for what starts from data.
        """
        generator = torch.Generator().manual_seed(3)
        bijection = self.make().to(device, dtype)
        with torch.no_grad():
            for seed in (7, 8):
                x = self.data(8, dtype, device, seed)
                bijection(x if self.unit_interval else 3 * x + 0.5, self.context(x))
            for p in bijection.parameters():
                p += (0.05 * torch.randn(p.shape, generator=generator)).to(p)
        return bijection

    def data(self, batch=4, dtype=torch.float64, device="cpu", seed=5):
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *self.event_shape)
        draw = torch.rand if self.unit_interval else torch.randn
        return draw(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def context(self, x):
        """A context for the batch ``x``, or None."""
        if self.context_shape is None:
            return None
        generator = torch.Generator().manual_seed(11)
        shape = (x.shape[0], *self.context_shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(x)


BIJECTIONS = [
    BijectionCase("SelfNormLinear", lambda: snf_ext.SelfNormLinear(6), (6,), learned=True),
    BijectionCase(
        "SelfNormLinear-no-bias", lambda: snf_ext.SelfNormLinear(3, bias=False), (3,), learned=True
    ),
    BijectionCase("SelfNormConv2d", lambda: snf_ext.SelfNormConv2d(2, 3), (2, 4, 5), learned=True),
    BijectionCase(
        "SelfNormConv2d-all-options",
        lambda: snf_ext.SelfNormConv2d(
            4,
            (3, 1),
            dilation=2,
            groups=2,
            bias=False,
            padding_mode="circular",
            inverse_kernel_size=5,
        ),
        (4, 6, 5),
        learned=True,
    ),
    BijectionCase("SelfNormBijection", lambda: residual_pair((4,)), (4,), learned=True),
    BijectionCase(
        "SelfNormBijection-image",
        lambda: residual_pair((2, 1, 3), probes=3),
        (2, 1, 3),
        learned=True,
    ),
    BijectionCase("ExactLinear", lambda: snf_ext.ExactLinear(5), (5,)),
    BijectionCase("ExactConv2d", lambda: snf_ext.ExactConv2d(2, 3, groups=2), (2, 3, 4)),
    BijectionCase("SmoothLeakyReLU", lambda: snf_ext.SmoothLeakyReLU(0.3), (2, 3)),
    BijectionCase("SmoothLeakyReLU-steep", lambda: snf_ext.SmoothLeakyReLU(0.01), (5,)),
    BijectionCase("LeakyReLU", lambda: snf_ext.LeakyReLU(0.1), (2, 3)),
    BijectionCase("LearnableLeakyReLU", lambda: snf_ext.LearnableLeakyReLU(), (2, 3)),
    BijectionCase("SmoothTanh", lambda: snf_ext.SmoothTanh(), (2, 3)),
    BijectionCase("SmoothTanh-steep", lambda: snf_ext.SmoothTanh(3.0, 0.5), (5,)),
    BijectionCase("Logit", lambda: snf_ext.Logit(1e-6), (2, 3), unit_interval=True),
    BijectionCase("Normalize", lambda: snf_ext.Normalize(0.5, -3.0), (2, 3)),
    BijectionCase("Dequantize", lambda: snf_ext.Dequantize(8), (4,), noisy=True),
    BijectionCase(
        "VariationalDequantize",
        lambda: snf_ext.VariationalDequantize((2, 3, 3), 8, width=4),
        (2, 3, 3),
        noisy=True,
    ),
    BijectionCase(
        "VariationalDequantize-vector",
        lambda: snf_ext.VariationalDequantize((4,), 8, width=4, steps=2),
        (4,),
        noisy=True,
    ),
    BijectionCase("Flatten", lambda: snf_ext.Flatten((2, 3)), (2, 3)),
    BijectionCase("Squeeze", lambda: snf_ext.Squeeze(), (2, 4, 6)),
    BijectionCase("Unsqueeze", lambda: snf_ext.Unsqueeze(), (8, 2, 3)),
    BijectionCase("Permutation", lambda: snf_ext.Permutation(5), (5,)),
    BijectionCase("Permutation-columns", lambda: snf_ext.Permutation(3, -1, (2, 0, 1)), (2, 2, 3)),
    BijectionCase("ComponentwiseAffine", lambda: snf_ext.ComponentwiseAffine((2, 3)), (2, 3)),
    BijectionCase(
        "ComponentwiseAffine-context",
        lambda: snf_ext.ComponentwiseAffine((2, 3), context_features=2),
        (2, 3),
        context_shape=(2,),
    ),
    BijectionCase("BatchNorm", lambda: snf_ext.BatchNorm(3), (3, 2, 2), batch_dependent=True),
    BijectionCase(
        "BatchNorm-vector", lambda: snf_ext.BatchNorm(4, 0.5), (4,), batch_dependent=True
    ),
    BijectionCase("Spline", lambda: snf_ext.RationalQuadraticSpline((2, 3)), (2, 3)),
    BijectionCase(
        "Spline-small", lambda: snf_ext.RationalQuadraticSpline((5,), bins=8, tail_bound=1.5), (5,)
    ),
    BijectionCase("ActNorm", lambda: snf_ext.ActNorm(3), (3, 2, 4)),
    BijectionCase("ActNorm-vector", lambda: snf_ext.ActNorm(4, init_batches=2), (4,)),
    BijectionCase("AffineCoupling", lambda: snf_ext.AffineCoupling(3, 5), (3, 2, 4)),
    BijectionCase(
        "AffineCoupling-flipped-maps",
        lambda: snf_ext.AffineCoupling(3, 5, flipped=True, context_features=2),
        (3, 2, 4),
        context_shape=(2, 2, 4),
    ),
    BijectionCase(
        "AffineCoupling-checkerboard",
        lambda: snf_ext.AffineCoupling(1, 5, mask="checkerboard", context_features=2),
        (1, 3, 4),
        context_shape=(2,),
    ),
    BijectionCase(
        "AffineCoupling-vector",
        lambda: snf_ext.AffineCoupling(5, 6, mask="vector", context_features=2),
        (5,),
        context_shape=(2,),
    ),
    BijectionCase("AdditiveCoupling", lambda: snf_ext.AdditiveCoupling(2, 5), (2, 3, 4)),
    BijectionCase(
        "AdditiveCoupling-checkerboard-flipped",
        lambda: snf_ext.AdditiveCoupling(2, 5, mask="checkerboard", flipped=True),
        (2, 3, 4),
    ),
    BijectionCase(
        "SplitPrior",
        lambda: snf_ext.SplitPrior((3, 4, 4), [snf_ext.Squeeze()], 5, context_features=2),
        (3, 4, 4),
        context_shape=(2,),
    ),
    BijectionCase(
        "SplitPrior-additive",
        lambda: snf_ext.SplitPrior(
            (3, 4, 4),
            [snf_ext.ActNorm(1), snf_ext.Squeeze(), snf_ext.AffineCoupling(4, 5)],
            5,
            additive=True,
        ),
        (3, 4, 4),
    ),
    BijectionCase(
        "SplitPrior-unconditional",
        lambda: snf_ext.SplitPrior((4, 1, 3), [snf_ext.SmoothLeakyReLU()], conditional=False),
        (4, 1, 3),
    ),
    BijectionCase("RelativeLinear", lambda: snf_ext.RelativeLinear(5), (5,), surrogate=True),
    BijectionCase("PlainConv1x1", lambda: snf_ext.PlainConv1x1(3), (3, 4, 2)),
    BijectionCase("LUConv1x1", lambda: snf_ext.LUConv1x1(3), (3, 2, 3)),
    BijectionCase("HouseholderConv1x1", lambda: snf_ext.HouseholderConv1x1(3), (3, 2, 3)),
    BijectionCase(
        "HouseholderConv1x1-two-reflections",
        lambda: snf_ext.HouseholderConv1x1(4, bias=False, reflections=2),
        (4, 3, 2),
    ),
    BijectionCase("EmergingConv2d", lambda: snf_ext.EmergingConv2d(2), (2, 4, 3)),
    BijectionCase(
        "EmergingConv2d-wide", lambda: snf_ext.EmergingConv2d(3, (5, 1), bias=False), (3, 2, 4)
    ),
    BijectionCase("ExponentialConv2d", lambda: snf_ext.ExponentialConv2d(2), (2, 4, 3)),
    BijectionCase(
        "ExponentialConv2d-at-its-bound",
        lambda: snf_ext.ExponentialConv2d(3, (1, 5), bias=False, norm_bound=0.3),
        (3, 2, 4),
    ),
]
