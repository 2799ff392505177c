"""The papers' architectures, on raw images."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from .bijection import Bijection
from .flow import Flow
from .layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ComponentwiseAffine,
    EmergingConv2d,
    ExactConv2d,
    ExactLinear,
    ExponentialConv2d,
    Flatten,
    HouseholderConv1x1,
    LUConv1x1,
    PlainConv1x1,
    RationalQuadraticSpline,
    RelativeLinear,
    SelfNormConv2d,
    SelfNormLinear,
    SmoothLeakyReLU,
    SplitPrior,
    Squeeze,
)
from .layers.preprocessing import preprocessing
from .models_zuko import autoregressive

__all__ = ["autoregressive", "conv", "fc", "glow"]

# Made from the number of features.
LINEAR: dict[str, Callable[..., Bijection]] = {
    "self_norm": SelfNormLinear,
    "exact": ExactLinear,
    "relative": RelativeLinear,
}

# Made from channels and kernel size.
CONV: dict[str, Callable[..., Bijection]] = {
    "self_norm": SelfNormConv2d,
    "exact": ExactConv2d,
    "emerging": EmergingConv2d,
    "exponential": ExponentialConv2d,
}

# Made from the number of channels: 1x1 convolutions.
CONV_1X1: dict[str, Callable[[int], Bijection]] = {
    "plain": PlainConv1x1,
    "lu": LUConv1x1,
    "householder": HouseholderConv1x1,
}

COUPLING: dict[str, Callable[..., Bijection]] = {
    "affine": AffineCoupling,
    "additive": AdditiveCoupling,
}

# Made from the shape of an event.
ACTIVATION: dict[str, Callable[[tuple[int, ...]], Bijection]] = {
    "spline": RationalQuadraticSpline,
    "smooth_leaky_relu": lambda event_shape: SmoothLeakyReLU(0.3),
}


def fc(
    event_shape: tuple[int, ...] = (1, 28, 28),
    layers: int = 2,
    linear: str = "self_norm",
    *,
    inverse: str | None = None,
    debias: int | None = None,
    context_features: int = 0,
    pixel_levels: int | None = 256,
    recon_weight: float = 1.0,
) -> Flow:
    """The fully connected flow: linear layers with smooth leaky ReLU (0.3) between them.

    On raw images of values 0 .. pixel_levels - 1: dequantization, scaling and logit are inside,
    and their Jacobian is counted.

    Args:
        event_shape: of one image or vector.
        layers: number of linear layers.
        linear: ``"self_norm"``, ``"exact"`` or ``"relative"``.
        inverse: how a learned inverse is kept (``"self_norm"`` alone): ``"penalty"`` if None,
            ``"inverse-only"``, ``"symmetric"`` or ``"tracked"``; see :mod:`snf_ext.layers.upkeep`.
        debias: K, terms that correct its gradient (``"self_norm"`` alone); 0 if None.
        context_features: size of the context; where there is one, the base density is a normal
            whose mean and scale depend on it.
        pixel_levels: number of values a pixel can take; None for continuous data, which is taken as
            it is.
        recon_weight: lambda.

    Raises:
        ValueError: an argument is unknown or does not fit the others.

    Source: SNF A.3, "2L FC": 2,460,192 parameters on MNIST.

    >>> sum(p.numel() for p in fc().parameters())
    2460192
    """
    make = _choice("linear", linear, LINEAR)
    learned = _of_learned_inverse(linear, inverse=inverse, debias=debias)
    _at_least_one(layers=layers)
    features = math.prod(event_shape)
    pixels = [] if pixel_levels is None else preprocessing(pixel_levels)
    bijections: list[Bijection] = [*pixels, Flatten(event_shape)]
    for index in range(layers):
        if index:
            bijections.append(SmoothLeakyReLU(0.3))
        bijections.append(make(features, **learned))
    bijections += _conditional_base((features,), context_features)
    return Flow(bijections, event_shape, recon_weight, context_features)


def conv(
    event_shape: tuple[int, int, int] = (1, 28, 28),
    layers: int = 9,
    blocks: int = 3,
    conv: str = "self_norm",
    inverse_kernel_size: int | None = None,
    *,
    inverse: str | None = None,
    debias: int | None = None,
    kernel_size: int = 3,
    activation: str = "spline",
    context_features: int = 0,
    pixel_levels: int = 256,
    recon_weight: float = 1.0,
) -> Flow:
    """The convolutional flow: blocks of convolutions with a squeeze between the blocks.

    An activation, with parameters of its own for every pixel, follows each convolution but the
    last. On raw images, as :func:`fc`.

    Args:
        event_shape: ``(C, H, W)``; H and W divisible by 2 once for each block but one.
        layers: number of convolutions, a multiple of ``blocks``.
        blocks: how many resolutions.
        conv: ``"self_norm"``, ``"exact"``, ``"emerging"`` or ``"exponential"``.
        inverse_kernel_size: of the learned inverses (``"self_norm"`` alone); as kernel_size if
            None.
        inverse, debias: as for :func:`fc`.
        kernel_size: of the convolutions.
        activation: ``"spline"`` (rational-quadratic, 5 bins, tail bound 10) or
            ``"smooth_leaky_relu"``.
        context_features: as for :func:`fc`.
        pixel_levels: number of values a pixel can take.
        recon_weight: lambda.

    Raises:
        ValueError: an argument is unknown or does not fit the others.

    Source: SNF A.3, "9L Conv": 102,613 parameters on MNIST.

    >>> sum(p.numel() for p in conv((1, 8, 8), layers=3).parameters())
    6727
    """
    convolution = _choice("conv", conv, CONV)
    learned = _of_learned_inverse(
        conv, inverse_kernel_size=inverse_kernel_size, inverse=inverse, debias=debias
    )
    activate = _choice("activation", activation, ACTIVATION)
    _at_least_one(layers=layers, blocks=blocks)
    if layers % blocks:
        raise ValueError(f"layers must be a multiple of blocks = {blocks}; got {layers}")
    shape = _image_shape(event_shape, squeezes=blocks - 1)
    bijections = preprocessing(pixel_levels)
    for index in range(layers):
        if index and index % (layers // blocks) == 0:
            bijections.append(Squeeze())
            shape = _squeezed(shape)
        bijections.append(convolution(shape[0], kernel_size, **learned))
        if index < layers - 1:
            bijections.append(activate(shape))
    bijections += _conditional_base(shape, context_features)
    return Flow(bijections, event_shape, recon_weight, context_features)


def glow(
    event_shape: tuple[int, int, int] = (1, 28, 28),
    levels: int = 2,
    steps: int = 16,
    width: int = 512,
    mixing: str = "self_norm",
    kernel_size: int = 1,
    *,
    inverse_kernel_size: int | None = None,
    inverse: str | None = None,
    debias: int | None = None,
    coupling: str = "affine",
    actnorm_batches: int = 1,
    context_features: int = 0,
    pixel_levels: int = 256,
    recon_weight: float = 100.0,
) -> Flow:
    """Glow: at each of several scales a squeeze and steps of actnorm, mixing and coupling.

    Between the scales half of the channels leaves for the base density, scaled and shifted by what
    a coupling reads from the other half (a split prior). The mixing layer starts at a random
    orthogonal matrix of the channels. On raw images, as :func:`fc`.

    Args:
        event_shape: ``(C, H, W)``; H and W divisible by 2 once for each level.
        levels: number of scales.
        steps: steps of flow at each scale.
        width: channels of the couplings' networks.
        mixing: ``"self_norm"``, ``"exact"``, ``"emerging"`` or ``"exponential"``, or one of
            the 1x1 convolutions ``"plain"``, ``"lu"`` and ``"householder"``.
        kernel_size: of the mixing layer.
        inverse_kernel_size: of its learned inverse (``"self_norm"`` alone).
        inverse, debias: as for :func:`fc`.
        coupling: ``"affine"`` or ``"additive"``.
        actnorm_batches: M, over how many batches actnorm's start is accumulated.
        context_features: size of the context that every coupling reads; 0 for none.
        pixel_levels: number of values a pixel can take.
        recon_weight: lambda.

    Raises:
        ValueError: an argument is unknown or does not fit the others.

    Source: SNF A.3; Kingma and Dhariwal 2018; additive coupling, LU and M: SFM.

    >>> flow = glow((1, 8, 8), levels=2, steps=1, width=8, mixing="lu")
    >>> flow.sample(3, temperature=0.7).shape, flow.latent_shape
    (torch.Size([3, 1, 8, 8]), (64,))
    """
    learned = _of_learned_inverse(
        mixing, inverse_kernel_size=inverse_kernel_size, inverse=inverse, debias=debias
    )
    mix = _choice("mixing", mixing, {**CONV, **CONV_1X1})
    if mixing in CONV:
        start = {"start": "orthogonal"} if mixing in ("self_norm", "exact") else {}
        mix = partial(mix, kernel_size=kernel_size, **start, **learned)
    elif kernel_size != 1:
        raise ValueError(f"kernel_size must be 1 for mixing {mixing!r}; got {kernel_size}")
    couple = _choice("coupling", coupling, COUPLING)
    _at_least_one(levels=levels, steps=steps, width=width, actnorm_batches=actnorm_batches)
    shape = _image_shape(event_shape, squeezes=levels)

    def scale(shape: tuple[int, int, int], level: int) -> list[Bijection]:
        shape = _squeezed(shape)
        bijections: list[Bijection] = [Squeeze()]
        for _ in range(steps):
            bijections += [
                ActNorm(shape[0], init_batches=actnorm_batches),
                mix(shape[0]),
                couple(shape[0], width, context_features=context_features),
            ]
        if level < levels:
            rest = scale((shape[0] // 2, *shape[1:]), level + 1)
            split = SplitPrior(shape, rest, width, context_features=context_features)
            bijections.append(split)
        else:
            bijections.append(Flatten(shape))
        return bijections

    bijections = [*preprocessing(pixel_levels), *scale(shape, 1)]
    return Flow(bijections, event_shape, recon_weight, context_features)


def _conditional_base(shape: tuple[int, ...], context_features: int) -> list[Bijection]:
    if not context_features:
        return []
    return [ComponentwiseAffine(shape, context_features=context_features)]


def _of_learned_inverse(layer: str, **options: Any) -> dict[str, Any]:
    """The options that were given; ValueError if ``layer`` learns no inverse to have any."""
    given = {name: value for name, value in options.items() if value is not None}
    if given and layer != "self_norm":
        name, value = next(iter(given.items()))
        raise ValueError(f"{name} must be None for {layer!r}, which learns no inverse; got {value}")
    return given


def _choice(argument: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}; got {name!r}")
    return table[name]


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")


def _image_shape(event_shape: tuple[int, ...], squeezes: int) -> tuple[int, int, int]:
    step = 2**squeezes
    if len(event_shape) != 3 or event_shape[1] % step or event_shape[2] % step:
        raise ValueError(
            f"event_shape must be (C, H, W) with H and W divisible by {step}; "
            f"got {tuple(event_shape)}"
        )
    return event_shape[0], event_shape[1], event_shape[2]


def _squeezed(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return 4 * shape[0], shape[1] // 2, shape[2] // 2
