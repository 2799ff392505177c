"""Identities that change the gradient on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def halved(x: Tensor) -> Tensor:
    """``x`` itself; half its gradient.

    >>> x = torch.ones(2, requires_grad=True)
    >>> halved(x).sum().backward()
    >>> x.grad
    tensor([0.5000, 0.5000])
    """
    return _Halved.apply(x)


def mirrored(x: Tensor, mirror: Tensor) -> Tensor:
    """``x`` itself; what gradient comes back to it, its ``mirror`` gets with the opposite sign.

    >>> x, mirror = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    >>> (3 * mirrored(x, mirror)).sum().backward()
    >>> x.grad, mirror.grad
    (tensor([3., 3.]), tensor([-3., -3.]))
    """
    return _Mirrored.apply(x, mirror)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Scaled.apply(grads[0], 0.5)


class _Mirrored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mirror: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _Scaled.apply(grads[0], 1.0), _Scaled.apply(grads[0], -1.0)


class _Scaled(torch.autograd.Function):
    """A backward that refuses to be differentiated again, in words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return factor * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "double backward through a self-normalizing layer is not supported: "
            "its gradient is a learned approximation and has no derivative of its own"
        )
