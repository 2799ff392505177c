"""The small-noise bound of a flow on a set of images, beside their exact likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bijection import push
from ..flow import Flow
from ..variational import variational_bound
from .evaluate import batches_of, measuring, split_preprocessing


@dataclass(frozen=True)
class NoiseBound:
    """Means over images, in nats, preprocessing's Jacobian counted.

    Attributes:
        sigma: standard deviation of the noise, in model space.
        bound: upper bound on the ``-log p(x)`` of the noisy decoder.
        error: standard error of ``bound`` that comes of drawing the noise.
        nll: exact ``-log p(x)`` of the flow, that of :func:`snf_ext.training.evaluate.evaluate`.
    """

    sigma: float
    bound: float
    error: float
    nll: float


def noise_bound(
    flow: Flow,
    images: Tensor,
    sigma: float,
    seed: int = 0,
    context: Tensor | None = None,
    samples: int = 16,
) -> NoiseBound:
    """:func:`snf_ext.variational_bound` of raw ``images``, with the noise in model space.

    Model space is the input of the first layer that has parameters: noise is no integer, so that it
    cannot come before dequantization. ``seed`` is of the dequantization noise and of sigma's.

    Raises:
        ValueError: ``sigma`` is not positive and finite.

    Cost: ``samples`` exact likelihoods and passes back.

    >>> import snf_ext
    >>> flow = snf_ext.models.fc((1, 2, 2), pixel_levels=17)
    >>> result = noise_bound(flow, torch.randint(17, (10, 1, 2, 2), dtype=torch.uint8), 1e-3)
    >>> result.bound > result.nll
    True
    """
    before, rest = split_preprocessing(flow)
    total = torch.zeros(3, dtype=torch.float64)
    with measuring(flow, images):
        # All of it first: the dequantization noise is then the one of the exact likelihood.
        inputs = [
            (push(before, x, c, exact=True), c)
            for _, x, c in batches_of(flow, images, context, seed)
        ]
        for (u, log_det, _), c in inputs:
            model = Flow(rest, tuple(u.shape[1:]), context_features=flow.context_features)
            bound, exact, error = variational_bound(model, u, sigma, samples, c)
            parts = (bound + log_det, exact + log_det, error.square())
            total += torch.stack([part.double().sum().cpu() for part in parts])
    bound_sum, exact_sum, variance = total.tolist()
    count = len(images)
    return NoiseBound(sigma, -bound_sum / count, math.sqrt(variance) / count, -exact_sum / count)
