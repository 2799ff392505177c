"""Autoregressive, coupling and continuous flows of zuko, as one table.

A row makes a lazy transform from the number of features, of context features, of layers, and the
width of its hidden layers. Where several transforms are stacked, ``layers`` counts them and each
has a network of two hidden layers; the single transforms (MADE, CNF) have ``layers`` hidden
layers. Inputs should lie in about [-5, 5]: the splines and the Bernstein polynomials are the
identity outside, and bisection searches [-10, 10].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..training.errors import Diverged
from .zuko import import_zuko

SIGNAL = 8

Build = Callable[[int, int, int, int], nn.Module]


@dataclass(frozen=True)
class Family:
    """One row: what builds it, and how closely its inverse is found.

    Attributes:
        build: from (features, context_features, layers, width) to a lazy transform of zuko.
        inverse_error: of an input, in float64; that of arithmetic alone where it is tiny.
    """

    build: Build
    inverse_error: float = 1e-9


def _flow(name: str, **fixed: Any) -> Build:
    """A stack of transforms, as zuko's flow ``name`` has it."""

    def build(features: int, context: int, layers: int, width: int) -> nn.Module:
        flow = getattr(import_zuko().flows, name)
        return _transform(
            flow(features, context, transforms=layers, hidden_features=[width] * 2, **fixed)
        )

    return build


def _transform(flow: Any) -> nn.Module:
    transform: nn.Module = flow.transform
    return transform


def _made(features: int, context: int, layers: int, width: int) -> nn.Module:
    maf = import_zuko().flows.MAF
    return _transform(maf(features, context, transforms=1, hidden_features=[width] * layers))


def _iaf(features: int, context: int, layers: int, width: int) -> nn.Module:
    maf = _flow("MAF")(features, context, layers, width)
    inverse: nn.Module = import_zuko().lazy.LazyInverse(maf)
    return inverse


def _nice(features: int, context: int, layers: int, width: int) -> nn.Module:
    """Without the scale at the end no volume could change."""
    zuko = import_zuko()
    couplings = _flow("NICE", univariate=_shift, shapes=[()])(features, context, layers, width)
    scale = zuko.lazy.UnconditionalTransform(
        zuko.transforms.MonotonicAffineTransform, torch.zeros(features), torch.zeros(features)
    )
    composed: nn.Module = zuko.lazy.LazyComposedTransform(couplings, scale)
    return composed


def _shift(shift: Tensor) -> Any:
    return import_zuko().transforms.MonotonicAffineTransform(shift, torch.zeros_like(shift))


def _dsf(features: int, context: int, layers: int, width: int, sigmoids: int = 8) -> nn.Module:
    shapes = [(sigmoids,)] * 3
    return _flow("MAF", univariate=sigmoidal, shapes=shapes)(features, context, layers, width)


def _neural(name: str, shapes: list[tuple[int, ...]]) -> Build:
    """Monotonic networks ``name`` that all elements share, each modulated by its own signal.

    zuko's NAF and UNAF have a network for each element, which cannot be inverted one at a time.
    """

    def build(features: int, context: int, layers: int, width: int) -> nn.Module:
        zuko = import_zuko()
        clip = zuko.transforms.SoftclipTransform  # into what the next inverse can reach
        order = torch.arange(features)
        stack: list[nn.Module] = []
        for index in range(layers):
            if index:
                stack.append(zuko.lazy.UnconditionalTransform(clip, bound=11.0))
            stack.append(
                zuko.flows.MaskedAutoregressiveTransform(
                    features,
                    context,
                    order=order.flip(0) if index % 2 else order,
                    univariate=getattr(zuko.flows.neural, name)(SIGNAL, hidden_features=(16, 16)),
                    shapes=shapes,
                    hidden_features=[width] * 2,
                )
            )
        composed: nn.Module = zuko.lazy.LazyComposedTransform(*stack)
        return composed

    return build


def _cnf(features: int, context: int, layers: int, width: int) -> nn.Module:
    ffj = import_zuko().flows.FFJTransform
    transform = ffj(features, context, hidden_features=[width] * layers)
    transform.register_forward_pre_hook(_set_tolerance)
    # zuko's solver shortens its step for ever where an error is NaN.
    transform.ode.register_forward_hook(_refuse_non_finite)
    continuous: nn.Module = transform
    return continuous


def _set_tolerance(module: Any, args: tuple[Any, ...]) -> None:
    """Values that are reported cost more than those that are only differentiated."""
    module.atol = module.rtol = 1e-3 if module.training else 1e-5


def _refuse_non_finite(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if not torch.isfinite(output.detach()).all():
        raise Diverged("the velocity of the continuous flow must be finite; got NaN or inf")


def sigmoidal(weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """Deep sigmoidal transform of one element: ``y = logit(sum_k w_k sigmoid(a_k x + b_k))``.

    ``w = softmax(weight)``, ``a = softplus(scale + log(e - 1))``, which starts near 1, and
    ``b = shift``, each ``(*, K)``. Increasing, with slopes between those of a in the tails; the
    inverse is found by bisection.

    Source: Huang et al. 2018, "DSF"; computed in logarithms throughout.
    """
    log_weight = functional.log_softmax(weight, -1)
    slope = functional.softplus(scale + math.log(math.expm1(1.0)))

    def f(x: Tensor) -> Tensor:
        u = slope * x[..., None] + shift
        above = torch.logsumexp(log_weight + functional.logsigmoid(u), -1)
        below = torch.logsumexp(log_weight + functional.logsigmoid(-u), -1)
        return above - below

    phi = (weight, scale, shift)
    return import_zuko().transforms.MonotonicTransform(f, phi=phi)


BISECTION = 5e-6  # 5e-7 a layer, carried on by the next
SOLVER = 1e-3

FAMILIES: dict[str, Family] = {
    # Affine in each element
    "made": Family(_made),
    "maf": Family(_flow("MAF")),
    "iaf": Family(_iaf),
    "nice": Family(_nice),
    "realnvp": Family(_flow("NICE")),  # zuko calls affine couplings NICE
    # Increasing functions of each element, with an inverse in closed form
    "nsf": Family(_flow("NSF")),
    "nsf_coupling": Family(_flow("NSF", passes=2)),
    # The same, inverted by bisection
    "naf": Family(_neural("MNN", [(SIGNAL,)]), BISECTION),
    "dsf": Family(_dsf, BISECTION),
    "unaf": Family(_neural("UMNN", [(SIGNAL,), ()]), BISECTION),
    "sospf": Family(_flow("SOSPF"), BISECTION),
    "bpf": Family(_flow("BPF"), BISECTION),
    # Not triangular
    "gf": Family(_flow("GF"), BISECTION),
    "cnf": Family(_cnf, SOLVER),
}
