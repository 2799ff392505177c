"""Jacobians of functions of events: random directions through them, and the whole of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from . import func_transforms
from .bijection import wide_dtype
from .shard import drawn_for

EventMap = Callable[[Tensor], Tensor]
"""Maps a batch of events to one of the same shape, each event on its own."""

CHUNK = 1 << 24  # elements of the directions that the whole Jacobian pushes at a time


def orthonormal_probes(x: Tensor, count: int) -> Tensor:
    """``count`` random directions for each event of ``x``: orthogonal, of length sqrt(D).

    ``(count, *x.shape)``. With Q the orthonormal factor of a normal ``(D, P)`` matrix, turning it
    leaves its distribution as it is, so that ``E[Q Q'] = (P/D) I``. Hence the mean over
    ``v = sqrt(D) q`` of ``v'A v`` is an unbiased estimate of ``tr A``, and the trace itself for
    P = D.

    Cost: O(D P^2) an event. Source: Draxler et al. 2024, "Free-form flows", where independent
    directions are replaced by orthonormal ones; a classic of stochastic trace estimation.

    >>> v = orthonormal_probes(torch.zeros(5, 3), 2)
    >>> v.shape, torch.allclose((v[0] * v[1]).sum(1), torch.zeros(5), atol=1e-5)
    (torch.Size([2, 5, 3]), True)
    >>> torch.allclose(v.square().sum(2), torch.tensor(3.0))
    True
    """
    size = math.prod(x.shape[1:])
    empty = torch.empty(x.shape[0], size, count, dtype=wide_dtype(x.dtype), device=x.device)
    normal = drawn_for(empty, torch.randn_like)
    if count == 1:
        q = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    else:
        q = torch.linalg.qr(normal).Q
    probes = (math.sqrt(size) * q).permute(2, 0, 1)
    return probes.reshape(count, *x.shape).to(x.dtype)


def pushed(function: EventMap, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``J v`` for each v of ``directions`` ``(P, *x.shape)``; J that of f at x.

    Cost: one forward pass, and one of the same size a direction.

    >>> y, tangents = pushed(torch.square, torch.tensor([[3.0]]), torch.ones(2, 1, 1))
    >>> y.item(), tangents.flatten().tolist()
    (9.0, [6.0, 6.0])
    """
    x = x.contiguous()  # forward mode refuses expanded tensors

    def push(v: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(function, (x,), (v,))  # type: ignore[return-value]

    if func_transforms.active():  # vmap in vmap takes y for batched, though it is so only outside
        y, tangents = vmap(push)(directions)
        return y[0], tangents
    return vmap(push, out_dims=(None, 0))(directions)  # type: ignore[arg-type]


def pulled(function: EventMap, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``J'v`` for each v of ``directions`` ``(P, *x.shape)``; J that of f at x.

    Cost: one forward pass, and one backward pass a direction.

    >>> y, tangents = pulled(torch.square, torch.tensor([[3.0]]), torch.ones(2, 1, 1))
    >>> y.item(), tangents.flatten().tolist()
    (9.0, [6.0, 6.0])
    """
    y, back = vjp(function, x)  # type: ignore[misc]
    return y, vmap(lambda v: back(v)[0])(directions)


def jacobian(function: EventMap, x: Tensor) -> Tensor:
    """J of f at every event of ``x`` ``(B, ...)``, ``(B, D, D)``; differentiable.

    Cost: D forward passes of the batch; O(B D^2) memory and, where it is to be differentiated,
    the activations of all of them.

    >>> jacobian(lambda x: x.flip(1) * 2, torch.zeros(1, 2)).tolist()
    [[[0.0, 2.0], [2.0, 0.0]]]
    """
    x, size = x.contiguous(), math.prod(x.shape[1:])  # forward mode refuses expanded tensors
    basis = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])
    if torch.compiler.is_compiling():  # of a batch of unknown size there are no chunks
        columns = pushed(function, x, basis.expand(size, *x.shape).contiguous())[1]
    else:
        columns = vmap(
            lambda v: jvp(function, (x,), (v.expand_as(x),))[1],
            chunk_size=max(1, CHUNK // max(1, x.numel())),
        )(basis)
    return columns.reshape(size, x.shape[0], size).permute(1, 2, 0)
