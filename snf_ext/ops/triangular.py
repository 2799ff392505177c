"""Dispatch, fake kernel and gradient of the substitution; see ``snf_ext.reference.triangular``.

The gradient is registered here and not in C++: the operator runs in inverses, not in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import build_info, runs_native
from ..reference.checks import check_triangular
from ..reference.convolution import flip
from ..reference.triangular import solve_weight_gradient


def triangular_conv2d_solve(z: Tensor, weight: Tensor, upper: bool = False) -> Tensor:
    """:func:`snf_ext.reference.triangular_conv2d_solve` on the backend in use."""
    if runs_native(z.device):
        return torch.ops.snf_ext.triangular_conv2d_solve(z, weight, upper)
    return reference.triangular_conv2d_solve(z, weight, upper)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, ctx.upper = inputs
    ctx.save_for_backward(weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x = ctx.saved_tensors
    grad_z = grad_weight = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        # The transposed system: the flipped kernel, in the opposite order.
        grad_z = torch.ops.snf_ext.triangular_conv2d_solve(grad, flip(weight), not ctx.upper)
        if ctx.needs_input_grad[1]:
            grad_weight = solve_weight_gradient(grad_z, x, weight, ctx.upper)
    return grad_z, grad_weight, None


if build_info()["cpp"]:

    @torch.library.register_fake("snf_ext::triangular_conv2d_solve")
    def _(z: Tensor, weight: Tensor, upper: bool = False) -> Tensor:
        check_triangular(z, weight)
        return z.new_empty(z.shape)

    torch.library.register_autograd(
        "snf_ext::triangular_conv2d_solve", _backward, setup_context=_keep
    )
