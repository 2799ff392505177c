"""The autoregressive competitors of the notes, on raw images; zuko does the work."""

from __future__ import annotations

import math

from .adapters.families import FAMILIES
from .adapters.zuko import ZukoBijection
from .bijection import Bijection
from .flow import Flow
from .layers import Flatten, Normalize
from .layers.preprocessing import preprocessing

LOGIT_SCALE = 4.0


def autoregressive(
    event_shape: tuple[int, ...] = (1, 28, 28),
    family: str = "maf",
    layers: int = 3,
    width: int = 64,
    context_features: int = 0,
    *,
    pixel_levels: int | None = 256,
    recon_weight: float = 0.0,
) -> Flow:
    """A flow of zuko behind dequantization, scaling and logit, as the other models have them.

    The logits, of ±14 at most and ±5 mostly, are divided by 4: the families with a bounded
    support want values of a few units.

    =================  ============================================================  =============
    family             what it is                                                    passes: z, x
    =================  ============================================================  =============
    made               one masked affine transform, ``layers`` hidden layers         1, D
    maf                a stack of them, their order reversed in turn                 1, D
    iaf                the inverse of maf: slow to train, samples in one pass        D, 1
    nice               additive couplings, a scale for each element at the end       1, 1
    realnvp            affine couplings                                              1, 1
    nsf, nsf_coupling  rational-quadratic splines, autoregressive or coupling        1, D or 2
    naf                monotonic networks                                            1, D
    dsf                sums of sigmoids                                              1, D
    unaf               integrals of positive networks                                1, D
    sospf              integrals of sums of squared polynomials                      1, D
    bpf                Bernstein polynomials                                         1, D
    gf                 rotations and mixtures' distribution functions, element-wise  1, 1
    cnf                an ODE of a network with ``layers`` hidden layers             solver
    =================  ============================================================  =============

    Cost: D = prod(event_shape). The autoregressive ones take O(B D (width + D)) a pass; iaf
    keeps D passes for backward, gf exponentiates D × D matrices, and cnf takes a Jacobian's trace,
    O(B D² width) an evaluation: these are for small D. The inverses of naf, dsf, unaf, sospf, bpf
    and gf bisect, 25 evaluations a pass.

    Args:
        event_shape: of one image or vector.
        family: one of the table.
        layers: transforms in the stack; for made and cnf hidden layers.
        width: of hidden layers.
        context_features: C of contexts ``(B, C)``; 0 for none.
        pixel_levels: number of values a pixel can take; None for continuous data, which is taken as
            it is.
        recon_weight: lambda; no layer here has a learned inverse, so it has no effect.

    Raises:
        ValueError: an unknown ``family``, ``layers`` or ``width`` below 1, ``context_features``
            below 0, or an event of a single element.
        UserError: zuko is not installed.

    Source: NNN 10.3; the papers that zuko's documentation names.

    >>> import torch
    >>> flow = autoregressive((1, 2, 3), family="nsf", context_features=2, pixel_levels=17)
    >>> images, context = torch.randint(17, (8, 1, 2, 3)), torch.randn(8, 2)
    >>> flow.log_prob(images, context).shape, flow.sample(8, context).shape
    (torch.Size([8]), torch.Size([8, 1, 2, 3]))
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    for name, value, least in (
        ("layers", layers, 1),
        ("width", width, 1),
        ("context_features", context_features, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    features = math.prod(event_shape)
    if features < 2:
        raise ValueError(f"event_shape must hold at least 2 elements; got {list(event_shape)}")
    lazy = FAMILIES[family].build(features, context_features, layers, width)
    pixels: list[Bijection] = []
    if pixel_levels is not None:
        pixels = [*preprocessing(pixel_levels), Normalize(0.0, LOGIT_SCALE)]
    bijections = [
        *pixels,
        Flatten(event_shape),
        ZukoBijection(lazy, features, context_features),
    ]
    return Flow(bijections, event_shape, recon_weight, context_features)
