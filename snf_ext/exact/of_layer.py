"""The factorised matrix of a layer: kept beside its weight, or by operators where code is traced.

Compiled and exported programs and the transforms of ``torch.func`` see tensors without values, and
cannot look for what is kept. They meet two operators instead, which look when the program runs.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import Function

from .. import func_transforms
from ..reference.convolution import flip
from .cache import FactorizationCache
from .factorization import Factorization, factorize_conv2d, factorize_linear


def factorized(
    cache: FactorizationCache, weight: Tensor, geometry: tuple[int, ...] = ()
) -> Factorization:
    """The factorisation of the matrix that ``weight`` stands for, which sends it no gradient.

    Args:
        cache: where it is kept.
        weight: of a linear layer, ``(D, D)``, or of a convolution.
        geometry: of a convolution ``(H, W, dilation, groups, circular)``.

    >>> cache, weight = FactorizationCache(), 2 * torch.eye(3)
    >>> round(factorized(cache, weight).log_abs_det.item(), 4)
    2.0794
    """
    if torch.compiler.is_compiling() or func_transforms.active():
        return _Traced(weight.detach(), geometry)
    return cache.get(weight, geometry, lambda: _factorize(weight, geometry))


def differentiates(weight: Tensor) -> bool:
    """Whether somebody may differentiate by ``weight``: a transform may, in ways it does not show.

    >>> differentiates(torch.ones(2)), differentiates(torch.ones(2, requires_grad=True))
    (False, True)
    """
    return func_transforms.active() or (torch.is_grad_enabled() and weight.requires_grad)


def _factorize(weight: Tensor, geometry: tuple[int, ...]) -> Factorization:
    if not geometry:
        return factorize_linear(weight)
    height, width, dilation, groups, circular = geometry
    return factorize_conv2d(weight, (height, width), dilation, groups, bool(circular))


class _Traced:
    """A :class:`Factorization` that is made, or found, when the program runs."""

    def __init__(self, weight: Tensor, geometry: tuple[int, ...]) -> None:
        # An operator's list of ints takes no bool.
        self._weight, self._geometry = (
            weight,
            [int(g) if isinstance(g, bool) else g for g in geometry],
        )

    @property
    def log_abs_det(self) -> Tensor:
        return _log_abs_det(self._weight, self._geometry)

    def solve(self, rhs: Tensor) -> Tensor:
        if func_transforms.active() and not torch.compiler.is_compiling():
            return _Solve.apply(self._weight, rhs, self._geometry, False)
        return _solve(self._weight, rhs, self._geometry, False)


class _Solve(Function):
    """The operator for transforms of torch.func, which take no gradient of an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rhs: Tensor, geometry: list[int], transposed: bool) -> Tensor:
        return _solve(weight, rhs, geometry, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, ctx.geometry, ctx.transposed = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return None, _Solve.apply(weight, grad, ctx.geometry, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, rhs: Tensor, *rest: Any) -> Tensor:
        return _Solve.apply(ctx.saved_tensors[0], rhs, ctx.geometry, ctx.transposed)


# What the operators have factorised, as long as the weight lives. By its memory: programs and
# transforms make tensors of their own of it. The parts of one memory have a cache each.
_kept: WeakKeyDictionary[Any, dict[Any, FactorizationCache]] = WeakKeyDictionary()


def _found(weight: Tensor, geometry: list[int], transposed: bool = False) -> Factorization:
    caches = _kept.setdefault(weight.untyped_storage(), {})
    part = (weight.storage_offset(), weight.dtype, tuple(weight.shape), weight.stride())
    cache = caches.setdefault(part, FactorizationCache())

    def factorize() -> Factorization:
        own = _transpose(weight, geometry) if transposed else weight
        return _factorize(own, tuple(geometry))

    return cache.get(weight, (tuple(geometry), transposed), factorize)


def _transpose(weight: Tensor, geometry: list[int]) -> Tensor:
    return flip(weight, geometry[3]) if geometry else weight.T


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64


# They look at values, which a CUDA graph cannot.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("snf_ext::factorized_log_abs_det", mutates_args=(), tags=_TAGS)
def _log_abs_det(weight: Tensor, geometry: list[int]) -> Tensor:
    """``log |det|`` of the matrix of ``weight`` in nats, a scalar."""
    value = _found(weight, geometry).log_abs_det
    return value.to(weight.device, _precision(weight), copy=True)


@torch.library.custom_op("snf_ext::factorized_solve", mutates_args=(), tags=_TAGS)
def _solve(weight: Tensor, rhs: Tensor, geometry: list[int], transposed: bool) -> Tensor:
    """x with ``A x = rhs`` for each row, A the matrix of ``weight`` or its transpose."""
    solved = _found(weight, geometry, transposed).solve(rhs)
    return solved.clone(memory_format=torch.contiguous_format)


@_log_abs_det.register_fake
def _(weight: Tensor, geometry: list[int]) -> Tensor:
    return weight.new_empty((), dtype=_precision(weight))


@_solve.register_fake
def _(weight: Tensor, rhs: Tensor, geometry: list[int], transposed: bool) -> Tensor:
    return rhs.new_empty(rhs.shape)


@_log_abs_det.register_vmap
def _(info: Any, in_dims: Any, weight: Tensor, geometry: list[int]) -> tuple[Tensor, int]:
    weights = weight.movedim(in_dims[0], 0).unbind()
    return torch.stack([_log_abs_det(w, geometry) for w in weights]), 0


@_solve.register_vmap
def _(
    info: Any, in_dims: Any, weight: Tensor, rhs: Tensor, geometry: list[int], transposed: bool
) -> tuple[Tensor, int]:
    of_weight, of_rhs = in_dims[:2]
    rows = rhs.expand(info.batch_size, *rhs.shape) if of_rhs is None else rhs.movedim(of_rhs, 0)
    if of_weight is None:
        return _solve(weight, rows.flatten(0, 1), geometry, transposed).view(rows.shape), 0
    weights = weight.movedim(of_weight, 0).unbind()
    solved = [_solve(w, r, geometry, transposed) for w, r in zip(weights, rows, strict=True)]
    return torch.stack(solved), 0


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, ctx.geometry, ctx.transposed = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return None, _solve(weight, grad, ctx.geometry, not ctx.transposed), None, None


_solve.register_autograd(_backward, setup_context=_keep)
