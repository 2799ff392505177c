"""Every way of doing the step of one rational-quadratic spline; see ``bench.cases.SPLINE``.

A step is forward and backward of sum(y^2) / 2 - sum(log_abs_det), with the gradients of x and of
all parameters, which the batch shares. Others want the parameters expanded to the batch, so their
step includes that. nflows and normflows select with boolean masks and gather, as the paper's
public code does, which is therefore not timed beside them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import snf_ext
from snf_ext.reference.spline import UNIT_SLOPE

from .cases import SplineCase
from .steps import native_is_built
from .timing import Variant

__all__ = ["spline_variants"]

TAIL_BOUND = 10.0
Spline = Callable[..., tuple[Tensor, Tensor]]


def spline_variants(
    case: SplineCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """The variants that can be built here; a library that is not installed is left out."""
    torch.manual_seed(0)
    d, k = case.features, case.bins
    x = 4 * torch.randn(case.batch, d)
    raw = [0.5 * torch.randn(d, n) for n in (k, k, k - 1)]
    # The gradient in x jumps at a knot, so that on which side of it x stands must not be rounding.
    knots = snf_ext.reference.spline._knots(raw[0], 1e-3, TAIL_BOUND)
    near = ((x[..., None] - knots).abs() < 1e-4).any(-1)
    tensors = tuple(t.to(device) for t in (torch.where(near, x + 1e-3, x), *raw))

    variants = []
    if native_is_built(device):
        variants.append(_variant("native", snf_ext.ops.rq_spline, tensors, "native"))
    variants.append(_variant("reference", snf_ext.reference.rq_spline, tensors))
    if compiled:
        torch.compiler.reset()
        function = torch.compile(snf_ext.reference.rq_spline, dynamic=False)
        variants.append(_variant("compiled reference", function, tensors))
    for name, module in (
        ("nflows", "nflows.transforms.splines.rational_quadratic"),
        ("normflows", "normflows.utils.splines"),
    ):
        if (found := _import(module)) is not None:
            function = _expanded(found.unconstrained_rational_quadratic_spline)
            variants.append(_variant(name, function, tensors))
    if (zuko := _import("zuko.transforms")) is not None:
        variants.append(_zuko(zuko, tensors))
    return variants


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _step(function: Spline, leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y, log_abs_det = function(*leaves, TAIL_BOUND)
        (0.5 * y.square().sum() - log_abs_det.sum()).backward()

    return step


def _variant(
    name: str, function: Spline, tensors: tuple[Tensor, ...], backend: str = "reference"
) -> Variant:
    leaves = tuple(t.detach().clone().requires_grad_() for t in tensors)
    return Variant(
        name, _step(function, leaves), lambda: snf_ext.use_backend(backend), leaves=leaves
    )


def _expanded(spline: Callable[..., tuple[Tensor, Tensor]]) -> Spline:
    """The spline of a library whose raw derivative 0 is not the slope 1."""

    def function(x: Tensor, w: Tensor, h: Tensor, d: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        w, h, d = (p.expand(len(x), *p.shape) for p in (w, h, d + UNIT_SLOPE))
        return spline(x, w, h, d, tail_bound=bound)

    return function


def _zuko(zuko: Any, tensors: tuple[Tensor, ...]) -> Variant:
    """The same knots in zuko's parametrisation, whose gradients of raw parameters are others.

    So only the gradient of x is left to be compared.
    """
    x, *raw = tensors
    knots = [_for_zuko(snf_ext.reference.spline._bin_sizes(p.double()).log(), 2) for p in raw[:2]]
    slopes = 1e-3 + torch.nn.functional.softplus(raw[2].double() + UNIT_SLOPE)
    parameters = [p.float() for p in (*knots, _for_zuko(slopes.log(), 1))]
    leaves = tuple(t.detach().clone().requires_grad_() for t in (x, *parameters))

    def function(x: Tensor, w: Tensor, h: Tensor, d: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        return zuko.MonotonicRQSTransform(w, h, d, bound=bound).call_and_ladj(x)

    return Variant("zuko", _step(function, leaves), leaves=leaves[:1])


def _for_zuko(log: Tensor, factor: int) -> Tensor:
    """The u with u / (1 + |factor u / log 1e-3|) = log, up to a constant where that is free."""
    if factor == 2:  # sizes, which a softmax follows: centred, so that both ends are in reach
        log = log - 0.5 * (log.amax(-1, keepdim=True) + log.amin(-1, keepdim=True))
    return log / (1 - (factor * log / 6.907755278982137).abs())
