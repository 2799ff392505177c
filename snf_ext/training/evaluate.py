"""Exact likelihood and reconstruction error of a flow on a set of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bijection import Bijection, FlowStep, per_sample_sum, pull, push
from ..flow import Flow
from .batches import split
from .seeds import derive_seed, seeded
from .world import ALONE, World

# Fixed, because the dequantization noise of an image depends on its place in the batch.
BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """What a flow does on a set of images.

    Attributes:
        images: how many.
        nll: mean exact ``-log p(x)`` in nats, preprocessing's Jacobian counted.
        nll_error: standard error of that mean, nats.
        bits_per_dim: ``nll / (D ln 2)``.
        reconstruction: mean over images of ``||g(f(u)) - u||^2``: u the image in model space (the
            input of the first layer that has parameters: dequantized, scaled, logit), f the rest
            of the flow, g its layers' learned inverses in reverse order.
        layer_recon: mean of each layer's own ``||R W x - x||^2``, for the layers that have one.
    """

    images: int
    nll: float
    nll_error: float
    bits_per_dim: float
    reconstruction: float
    layer_recon: dict[str, float]


def bits_per_dim(nats: float, event_shape: tuple[int, ...]) -> float:
    """``nats / (D ln 2)`` with D the number of elements of an event.

    >>> bits_per_dim(8 * math.log(2) * 784, (1, 28, 28))
    8.0
    """
    return nats / (math.prod(event_shape) * math.log(2))


def negative_log_likelihood(
    flow: Flow,
    images: Tensor,
    seed: int = 0,
    context: Tensor | None = None,
    world: World = ALONE,
) -> Tensor:
    """Exact ``-log p(x)`` of each image in nats, ``(N,)`` float64 on the CPU.

    Dequantization noise comes from ``seed`` and an image's place alone, so figures of one set can
    be compared; the caller's random numbers and the flow's mode are left as they were. The
    processes of ``world`` take the batches in turn, and all get the whole.
    """
    found = [torch.zeros(len(x), dtype=torch.float64) for x in images.split(BATCH)]
    with measuring(flow, images):
        for number, x, c in batches_of(flow, images, context, seed):
            if number % world.size == world.rank:
                found[number] = -flow.log_prob(x, c).double().cpu()
    return world.sum(torch.cat(found))


def reconstruction_error(
    flow: Flow, images: Tensor, seed: int = 0, context: Tensor | None = None
) -> tuple[float, dict[str, float]]:
    """``(reconstruction, layer_recon)`` as in :class:`Evaluation`."""
    total, count = 0.0, len(images)
    before, rest = split_preprocessing(flow)
    with measuring(flow, images), _layer_recon(flow) as layers:
        for _, x, c in batches_of(flow, images, context, seed):
            u = push(before, x, c, exact=False).z
            back = pull(rest, push(rest, u, c, exact=False).z, c, exact=False)
            total += (back - u).double().square().sum().item()
    return total / count, {name: value / count for name, value in layers.items()}


@contextmanager
def _layer_recon(flow: Flow) -> Iterator[dict[str, float]]:
    """Sums up the residuals of all layers with a learned inverse, however deep they stand."""
    layers: dict[str, float] = {}

    def add(name: str, step: FlowStep) -> None:
        layers[name] += per_sample_sum(step.recon).double().sum().item()

    hooks = []
    for name, module in flow.named_modules():
        if hasattr(module, "weight_inv"):
            layers[name] = 0.0
            hooks.append(
                module.register_forward_hook(lambda _, args, step, name=name: add(name, step))
            )
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def evaluate(
    flow: Flow,
    images: Tensor,
    seed: int = 0,
    context: Tensor | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Measure ``flow`` on raw ``images`` ``(N, *event_shape)``; see :class:`Evaluation`.

    Args:
        flow: any flow.
        images: raw.
        seed: of the dequantization noise.
        context: of each image, for a conditional flow.
        world: the processes that share the likelihoods.

    Cost: O(D^3) once for the determinants, O(N D^2) for the rest.

    >>> import snf_ext
    >>> flow = snf_ext.models.fc((1, 2, 2), pixel_levels=17)
    >>> result = evaluate(flow, torch.randint(17, (10, 1, 2, 2), dtype=torch.uint8))
    >>> result.images, sorted(result.layer_recon)
    (10, ['bijections.4', 'bijections.6'])
    """
    nll = negative_log_likelihood(flow, images, seed, context, world)
    mean = nll.mean().item()
    recon, layers = reconstruction_error(flow, images, seed, context)
    error = nll.std(correction=0).item() / math.sqrt(len(nll))
    bits = bits_per_dim(mean, flow.event_shape)
    return Evaluation(len(nll), mean, error, bits, recon, layers)


def split_preprocessing(flow: Flow) -> tuple[list[Bijection], list[Bijection]]:
    """The leading bijections without parameters, and the rest."""
    steps: list[Bijection] = list(flow.bijections)  # type: ignore[arg-type]
    first = next((i for i, step in enumerate(steps) if any(True for _ in step.parameters())), None)
    return steps[:first], [] if first is None else steps[first:]


def device_of(flow: Flow) -> torch.device:
    """Where the flow's parameters are."""
    return next((p.device for p in flow.parameters()), torch.device("cpu"))


def batches_of(
    flow: Flow, images: Tensor, context: Tensor | None, seed: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Always the same ones, numbered from 0, on the flow's device; within :func:`measuring`.

    Each finds the random generators as ``seed`` and its number want them.
    """
    for number, (x, c) in enumerate(split(images, context, BATCH)):
        torch.manual_seed(derive_seed(seed, "evaluate", number))
        yield number, x.to(device_of(flow)), c


@contextmanager
def measuring(flow: Flow, images: Tensor) -> Iterator[None]:
    """Evaluation mode, no gradients, own random numbers; everything put back at the end."""
    if not len(images):
        raise ValueError("images must be at least one; got none")
    training = flow.training
    flow.eval()
    try:
        with torch.no_grad(), seeded(device_of(flow), "evaluate"):
            yield
    finally:
        flow.train(training)
