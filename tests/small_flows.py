"""Small bijections and flows for the tests of training: nested, conditional."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import snf_ext
from snf_ext.bijection import Bijection, FlowStep, per_sample_zeros, pull, push, walk


class ContextAffine(Bijection):
    """``z = x exp(-scale) - shift`` of each class: the context chooses by a table."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(classes, features))
        self.scale = nn.Parameter(torch.zeros(classes, features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        scale = context @ self.scale
        z = x * torch.exp(-scale) - context @ self.shift
        return FlowStep(z, -scale.sum(1), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return (z + context @ self.shift) * torch.exp(context @ self.scale)


class Nest(Bijection):
    """Bijections inside a bijection, in an attribute ``rest``."""

    def __init__(self, rest: list[Bijection]) -> None:
        super().__init__()
        self.rest = nn.ModuleList(rest)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return push(self.rest, x, context, exact=False)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return push(self.rest, x, context, exact=True)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return pull(list(self.rest), z, context, exact)

    def parts(self, event_shape: tuple[int, ...]) -> Iterator[tuple[Bijection, tuple[int, ...]]]:
        yield from walk(self.rest, event_shape)


def conditional(
    event_shape: tuple[int, ...] = (1, 2, 3),
    width: float = 1.0,
    *,
    pixel_levels: int = 17,
    context_features: int = 3,
    recon_weight: float = 1.0,
) -> snf_ext.Flow:
    """A flow on images whose last part is of the class."""
    features = torch.Size(event_shape).numel()
    steps = [
        *snf_ext.models.preprocessing(pixel_levels),
        snf_ext.Flatten(event_shape),
        Nest([snf_ext.SelfNormLinear(features), snf_ext.SmoothLeakyReLU(0.3)]),
        ContextAffine(features, context_features),
    ]
    return snf_ext.Flow(steps, event_shape, recon_weight, context_features)
