"""The exact inverse, differentiable in whatever the bijections depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bijection import Bijection, pull, push


def exact_inverse(
    bijections: Sequence[Bijection], z: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x with ``f(x) = z`` and ``log |det J_f(x)|`` in nats, ``(B,)``, for f through ``bijections``.

    The layers' own exact inverses solve by factorisations that are kept, and so send no gradient
    to a weight. Here z, the context and the parameters p get that of the implicit function: with
    h the gradient of a loss in x, what the log-determinant sends to x included,

        u = J_f^-T h,      dz = u,      dp = -(df/dp)' u + what log |det J_f| sends to p

    where df/dp is what ``exact_forward`` says: the self-normalizing layers share it between the
    weight and the learned inverse, in halves (:mod:`snf_ext.layers.upkeep`), as they do the
    gradient of their log-determinant.

    Tensors that are no parameters of a bijection get no gradient.

    Raises:
        ValueError: a bijection has no inverse there.

    Cost: an inverse and a forward pass, and backward through each; no second derivative.
    Source: the implicit function theorem; Figurnov et al. 2018, "Implicit reparameterization
    gradients".

    >>> import snf_ext
    >>> layer = snf_ext.ExactLinear(1, bias=False)
    >>> layer.weight.data.fill_(4.0)
    tensor([[4.]])
    >>> x, log_det = exact_inverse([layer], torch.ones(1, 1))
    >>> x.sum().backward()
    >>> x.item(), layer.weight.grad.item()  # 1/w, -1/w^2
    (0.25, -0.0625)
    """
    if not torch.is_grad_enabled():
        x = pull(bijections, z, context, exact=True)
        return x, push(bijections, x, context, exact=True).log_det
    parameters = (p for bijection in bijections for p in bijection.parameters())
    learn = list(dict.fromkeys(p for p in parameters if p.requires_grad))
    x, log_det = _ExactInverse.apply(tuple(bijections), z, context, *learn)
    return x, log_det


class _ExactInverse(torch.autograd.Function):
    """Keeps a graph of the way back, for J_f^-T, and one of the way there."""

    @staticmethod
    def forward(
        ctx: Any,
        bijections: tuple[Bijection, ...],
        z: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.learn = list(parameters)
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            given = None if context is None else context.detach()
            ctx.z = z.detach().requires_grad_()
            ctx.x = pull(bijections, ctx.z, given, exact=True)
            ctx.start = ctx.x.detach().requires_grad_()
            if given is not None and ctx.needs_input_grad[2]:
                given = given.requires_grad_()
                ctx.learn.insert(0, given)
            ctx.end, ctx.log_det, _ = push(bijections, ctx.start, given, exact=True)
        return ctx.x.detach(), ctx.log_det.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dlog_det: Tensor | None) -> tuple[Any, ...]:
        ends: list[tuple[Tensor, Tensor]] = []  # outputs of the way there, and their gradients
        if dlog_det is not None and ctx.log_det.requires_grad:
            ends.append((ctx.log_det, dlog_det))
            (more,) = _gradients(ends, [ctx.start])
            if more is not None:
                dx = more if dx is None else dx + more
        u = None
        if dx is not None:
            (u,) = _gradients([(ctx.x, dx)], [ctx.z])
            if u is not None and ctx.end.requires_grad:
                ends.append((ctx.end, -u))
        found = iter(_gradients(ends, ctx.learn))
        return None, u, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def _gradients(ends: list[tuple[Tensor, Tensor]], of: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not ends or not of:
        return (None,) * len(of)
    outputs, gradients = zip(*ends, strict=True)
    return torch.autograd.grad(outputs, of, gradients, retain_graph=True, allow_unused=True)
