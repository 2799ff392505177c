"""The self-normalizing linear and convolution operators in plain torch.

Both layers map ``y = W x``, ``z = y + c`` and reconstruct ``e = R y - x`` by the learned inverse R.
With ``S`` the sum of the gradients of ``log_det`` and ``q`` those of ``recon``, both backwards are

    dx = W' dz
    dW = (dz / 2 + 2 q s R'e) x' + S/2 R'        (SNF 10, 17)
    dR = (2 q e - dx / 2) y' - S/2 W'            (SNF 11, 20)

where a convolution reads products with ``x'`` and ``y'`` as weight gradients, and the last terms as
``flip(r) * m(w)`` and ``flip(w) * m(r)`` (SNF 15, 16). ``recon`` sends no gradient to x. In the
papers W takes all of the penalty's gradient, s = 1.

Without a reconstruction there is no second density to share with, and W has the whole gradient,

    dW = dz x' + S R'
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import func_transforms
from ..bijection import wide_dtype
from .autocast import widened_under_autocast, without_autocast
from .checks import check_conv2d, check_linear, check_penalty_share
from .convolution import convolve, flip, inverse_term, weight_gradient


def snf_linear(
    x: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    bias: Tensor | None = None,
    reconstruct: bool = True,
    penalty_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-normalizing linear map ``z = W x + c`` of the last dimension.

    Args:
        x: ``(..., D)``.
        weight: W, ``(D, D)``.
        weight_inv: R, the learned inverse, ``(D, D)``.
        bias: c, ``(D,)``.
        reconstruct: False where the inverse is kept by other means, or nobody asks: recon is
            zeros without a gradient, R has no gradient and only stands for the inverse in W's.
        penalty_share: s, how much of recon's gradient W takes; 0 spares a product of backward.

    Returns:
        ``(z, log_det, recon)`` of shapes ``(..., D)``, ``(...)``, ``(...)``. The value of
        ``log_det`` is 0, its gradient the learned inverse's; ``recon = ||R W x - x||^2``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.

    Cost: 2 products of B D^2 forward, 4 backward; keeps x, y and e. Without a reconstruction 1 and
    2; keeps x. Source: SNF 4.1, A.1.

    >>> x, eye = torch.randn(2, 3), torch.eye(3)
    >>> z, log_det, recon = snf_linear(x, eye, eye)
    >>> torch.equal(z, x), recon.tolist()
    (True, [0.0, 0.0])
    """
    x, weight, weight_inv, bias = widened_under_autocast(x, weight, weight_inv, bias)
    check_linear(x, weight, weight_inv, bias)
    check_penalty_share(penalty_share)
    batch, wide = x.shape[:-1], wide_dtype(x.dtype)
    z, log_det, recon = _applied(
        _Linear,
        x.reshape(-1, x.shape[-1]).to(wide),
        weight.to(wide),
        weight_inv.to(wide),
        None if bias is None else bias.to(wide),
        reconstruct,
        penalty_share,
    )
    return z.to(x.dtype).view(x.shape), log_det.view(batch), recon.view(batch)


def snf_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
    reconstruct: bool = True,
    penalty_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-normalizing convolution of stride 1 that keeps the image's size.

    Args:
        x: ``(B, C, H, W)``.
        weight: w, ``(C, C/groups, kh, kw)`` with odd kh and kw.
        weight_inv: r, the learned inverse, ``(C, C/groups, k'h, k'w)``; its size may differ.
        bias: c, ``(C,)``.
        dilation: distance between the taps of both kernels, 1 to 2^31 - 1.
        groups: number of channel groups of both kernels.
        circular: wrap the image around instead of padding it with zeros.
        reconstruct: False where the inverse is kept by other means, or nobody asks: recon is
            zeros without a gradient, R has no gradient and only stands for the inverse in W's.
        penalty_share: s, how much of recon's gradient W takes; 0 spares a convolution of backward.

    Returns:
        ``(z, log_det, recon)`` of shapes ``(B, C, H, W)``, ``(B,)``, ``(B,)``. The value of
        ``log_det`` is 0, its gradient the learned inverse's; ``recon = ||r * (w * x) - x||^2``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.

    Cost: 2 convolutions forward, 4 of the same size backward; 1 and 2 without a reconstruction.
    Source: SNF 4.2, A.2, A.4.

    >>> x = torch.randn(2, 1, 4, 5)
    >>> dirac = torch.nn.init.dirac_(torch.empty(1, 1, 3, 3))
    >>> z, log_det, recon = snf_conv2d(x, dirac, dirac)
    >>> torch.equal(z, x), recon.tolist()
    (True, [0.0, 0.0])
    """
    x, weight, weight_inv, bias = widened_under_autocast(x, weight, weight_inv, bias)
    check_conv2d(x, weight, weight_inv, bias, dilation, groups)
    check_penalty_share(penalty_share)
    wide = wide_dtype(x.dtype)
    z, log_det, recon = _applied(
        _Conv2d,
        x.to(wide),
        weight.to(wide),
        weight_inv.to(wide),
        None if bias is None else bias.to(wide),
        dilation,
        groups,
        circular,
        reconstruct,
        penalty_share,
    )
    return z.to(x.dtype), log_det, recon


class _Linear(torch.autograd.Function):
    name = "snf_linear"

    @staticmethod
    def map(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        reconstruct: bool,
        penalty_share: float,
    ) -> Any:
        with without_autocast(x.device):
            y = _Linear.map(x, weight)
            e = y @ weight_inv.T - x if reconstruct else None
        z = y.clone() if bias is None else y + bias
        recon = _keep(ctx, x, weight, weight_inv, y, e)
        ctx.rest = (penalty_share,)
        return z, x.new_zeros(x.shape[0]), recon

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor, grad_recon: Tensor) -> Any:
        dx, dw, dr = func_transforms.run(
            _LinearBackward, grad_z, grad_log_det.sum(), grad_recon, *ctx.saved_tensors, *ctx.rest
        )
        dc = grad_z.sum(0) if ctx.needs_input_grad[3] else None
        return dx, dw, dr, dc, None, None


def _keep(
    ctx: Any, x: Tensor, weight: Tensor, weight_inv: Tensor, y: Tensor, e: Tensor | None
) -> Tensor:
    """Save what backward needs; return recon."""
    if e is None:
        ctx.save_for_backward(x, weight, weight_inv, None, None)
        recon = x.new_zeros(x.shape[0])
        ctx.mark_non_differentiable(recon)
        return recon
    ctx.save_for_backward(x, weight, weight_inv, y, e)
    return e.square().sum(tuple(range(1, e.dim())))


_once_differentiable = func_transforms.once_differentiable(
    "double backward through a self-normalizing layer is not supported: "
    "its gradient is a learned approximation and has no derivative of its own"
)


@_once_differentiable
class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z: Tensor,
        total: Tensor,
        grad_recon: Tensor,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        y: Tensor | None,
        e: Tensor | None,
        penalty_share: float,
    ) -> Any:
        with without_autocast(x.device):
            dx = grad_z @ weight
            if y is None or e is None:
                return dx, grad_z.T @ x + total * weight_inv.T, None
            pull = 2 * grad_recon[:, None] * e
            delta_w = 0.5 * grad_z
            if penalty_share:
                delta_w = delta_w + penalty_share * (pull @ weight_inv)
            dw = delta_w.T @ x + 0.5 * total * weight_inv.T
            dr = (pull - 0.5 * dx).T @ y - 0.5 * total * weight.T
        return dx, dw, dr


class _Conv2d(torch.autograd.Function):
    name = "snf_conv2d"
    map = staticmethod(convolve)

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        dilation: int,
        groups: int,
        circular: bool,
        reconstruct: bool,
        penalty_share: float,
    ) -> Any:
        geometry = (dilation, groups, circular)
        with without_autocast(x.device):
            y = convolve(x, weight, *geometry)
            e = convolve(y, weight_inv, *geometry) - x if reconstruct else None
        z = y.clone() if bias is None else y + bias[:, None, None]
        recon = _keep(ctx, x, weight, weight_inv, y, e)
        ctx.rest = (*geometry, penalty_share)
        return z, x.new_zeros(x.shape[0]), recon

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor, grad_recon: Tensor) -> Any:
        dx, dw, dr = func_transforms.run(
            _Conv2dBackward, grad_z, grad_log_det.sum(), grad_recon, *ctx.saved_tensors, *ctx.rest
        )
        dc = grad_z.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return dx, dw, dr, dc, None, None, None, None, None


@_once_differentiable
class _Conv2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z: Tensor,
        total: Tensor,
        grad_recon: Tensor,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        y: Tensor | None,
        e: Tensor | None,
        dilation: int,
        groups: int,
        circular: bool,
        penalty_share: float,
    ) -> Any:
        geometry = (dilation, groups, circular)
        with without_autocast(x.device):
            dx = convolve(grad_z, flip(weight, groups), *geometry)
            term = total * inverse_term(weight_inv, weight, x.shape[2:], *geometry)
            if y is None or e is None:
                return dx, weight_gradient(grad_z, x, weight, *geometry) + term, None
            pull = 2 * grad_recon[:, None, None, None] * e
            delta_w = 0.5 * grad_z
            if penalty_share:
                pulled = convolve(pull, flip(weight_inv, groups), *geometry)
                delta_w = delta_w + penalty_share * pulled
            dw = weight_gradient(delta_w, x, weight, *geometry) + 0.5 * term
            dr = weight_gradient(pull - 0.5 * dx, y, weight_inv, *geometry)
            dr = dr - 0.5 * total * inverse_term(weight, weight_inv, x.shape[2:], *geometry)
        return dx, dw, dr


def _applied(function: type[_Linear] | type[_Conv2d], *arguments: Any) -> tuple[Tensor, ...]:
    """z, log_det and recon."""
    if func_transforms.active() and not torch.compiler.is_compiling():
        function = _TRANSFORMED[function]
    return function.apply(*arguments)[:3]


def _transformed(function: type[_Linear] | type[_Conv2d]) -> Any:
    """``function`` for the transforms of torch.func: what backward needs are inputs and outputs.

    With a forward mode in x, where ``log_det`` and ``recon`` are constant; tracing takes none.
    """

    class Transformed(function):  # type: ignore[valid-type, misc]
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            kept: list[Tensor] = []
            ctx = SimpleNamespace(
                save_for_backward=lambda *tensors: kept.extend(tensors[3:]),
                mark_non_differentiable=lambda *tensors: None,
            )
            return *function.forward(ctx, *inputs), *kept

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            *tensors, reconstruct, penalty_share = inputs
            ctx.rest, ctx.reconstruct = (*tensors[4:], penalty_share), reconstruct
            ctx.save_for_backward(*inputs[:3], *output[3:])
            ctx.save_for_forward(inputs[1])
            fixed = output[3:] if reconstruct else output[2:3]
            ctx.mark_non_differentiable(*fixed)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(
            ctx: Any,
            grad_z: Tensor | None,
            grad_log_det: Tensor | None,
            grad_recon: Tensor | None,
            *rest: None,
        ) -> Any:
            x = ctx.saved_tensors[0]
            zeros = x.new_zeros(x.shape[0])
            return function.backward(
                ctx,
                torch.zeros_like(x) if grad_z is None else grad_z,
                zeros if grad_log_det is None else grad_log_det,
                zeros if grad_recon is None else grad_recon,
            )

        @staticmethod
        def jvp(ctx: Any, x: Tensor | None, *tensors_and_rest: Any) -> Any:
            if any(isinstance(t, Tensor) for t in tensors_and_rest):
                raise NotImplementedError(
                    f"forward-mode derivatives of {function.name} are those in x alone: in the "
                    "weights its gradient is a learned approximation; take grad, vjp or jacrev"
                )
            assert x is not None
            (weight,) = ctx.saved_tensors
            zeros = x.new_zeros(x.shape[0])
            recon = zeros if ctx.reconstruct else None
            return function.map(x, weight, *ctx.rest[:-1]), zeros, recon, None, None

    return Transformed


_TRANSFORMED = {function: _transformed(function) for function in (_Linear, _Conv2d)}
