"""Samples of a model by its learned inverse: the package's beside the composition's.

100 samples are one step. All variants hold the same numbers, and before timing they pull the same
noise back to the same images, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

import snf_ext

from .cases import FLOAT, MODELS, ConvCase, LinearCase, ModelCase
from .models import composed_like, make_flow, moved
from .steps import backend_context, backends
from .timing import Variant

__all__ = ["SAMPLING", "SampleCase", "check_samples", "sample_variants"]


@dataclass(frozen=True)
class SampleCase:
    """``samples`` images by the learned inverse of a model."""

    model: ModelCase
    samples: int = 100
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = True

    graph_us: ClassVar[Mapping[str, float]] = {}

    @property
    def name(self) -> str:
        return f"{self.samples} samples, {self.model.name}"

    @property
    def numbers(self) -> dict[str, int]:
        return {"samples": self.samples}

    @property
    def flops(self) -> float:
        """Operations of one product a layer, of the six that training takes."""
        return replace(self.model, batch=self.samples).flops / 6

    @property
    def bytes(self) -> int:
        """Activations read and written once a layer, and its parameters but for W read."""
        numbers = 0
        for part in self.model.parts:
            numbers += 2 * self.samples * math.prod(self.model.event_shape)
            learns = isinstance(part, LinearCase | ConvCase)  # half of it is W
            numbers += part.parameters // 2 if learns else part.parameters
        return FLOAT * numbers

    @property
    def calls(self) -> int:
        return len(self.model.parts)

    @property
    def launches(self) -> int:
        return self.calls


TARGETS = {"fc": 5.0, "conv": 8.0}
SAMPLING = tuple(
    SampleCase(model, targets={"composed": TARGETS[model.model]})
    for model in MODELS
    if model.model in TARGETS
)


def sample_variants(
    case: SampleCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Every way of drawing the samples; nothing is compiled."""
    torch.manual_seed(0)
    flow = make_flow(case.model).to(device).eval()
    composed = composed_like(flow, case.model)

    def draw(exact: bool = False) -> Tensor:
        return flow.sample(case.samples, exact=exact)

    return [
        *(Variant(name, draw, backend_context(name)) for name in backends(device)),
        Variant("composed", lambda: composed.sample(case.samples)),
        # By the true inverses, factorised once.
        Variant("exact inverse", lambda: draw(exact=True)),
    ]


def check_samples(case: SampleCase, backend: str, count: int = 4) -> None:
    """Compares images that a backend and the composition draw from one noise, in float64.

    Raises:
        RuntimeError: a pixel is not the same.
    """
    flow = moved(make_flow(case.model), torch.float64).eval()
    composed = composed_like(flow, case.model)
    generator = torch.Generator().manual_seed(1)
    features = math.prod(case.model.event_shape)
    z = torch.randn(count, features, generator=generator, dtype=torch.float64)
    with torch.no_grad(), snf_ext.use_backend(backend):
        ours = flow.inverse(z.view(count, *flow.latent_shape))
    theirs = composed.pull(z)
    differ = int((ours != theirs).sum())
    if differ:
        raise RuntimeError(f"{backend} and composed differ in {differ} of {ours.numel()} pixels")
