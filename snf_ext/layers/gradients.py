"""Identities that change the gradient on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import func_transforms


def halved(x: Tensor) -> Tensor:
    """``x`` itself; half its gradient.

    >>> x = torch.ones(2, requires_grad=True)
    >>> halved(x).sum().backward()
    >>> x.grad
    tensor([0.5000, 0.5000])
    """
    return func_transforms.run(_Halved, x)


def mirrored(x: Tensor, mirror: Tensor) -> Tensor:
    """``x`` itself; what gradient comes back to it, its ``mirror`` gets with the opposite sign.

    >>> x, mirror = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    >>> (3 * mirrored(x, mirror)).sum().backward()
    >>> x.grad, mirror.grad
    (tensor([3., 3.]), tensor([-3., -3.]))
    """
    return func_transforms.run(_Mirrored, x, mirror)


class _Edit(torch.autograd.Function):
    generate_vmap_rule = True
    forward_mode = (
        "a self-normalizing layer in training mode has no forward-mode derivatives: its gradient "
        "is a learned approximation; take grad, vjp or jacrev, or eval() first"
    )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass


class _Halved(_Edit):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return func_transforms.run(_Scaled, grads[0], 0.5)


class _Mirrored(_Edit):
    @staticmethod
    def forward(x: Tensor, mirror: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return func_transforms.run(_Scaled, grads[0], 1.0), func_transforms.run(
            _Scaled, grads[0], -1.0
        )


@func_transforms.once_differentiable(
    "double backward through a self-normalizing layer is not supported: "
    "its gradient is a learned approximation and has no derivative of its own"
)
class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return factor * x
