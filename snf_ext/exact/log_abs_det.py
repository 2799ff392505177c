"""Log-determinants with their exact gradient, for the layers that are trained by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import func_transforms
from .block_matrix import diagonal_block
from .convolution import factorize_groups, require_plan
from .fourier import fourier_log_abs_det
from .pieces import pieces
from .plan import layout_of, plan_conv2d


def linear_log_abs_det(weight: Tensor) -> Tensor:
    """``log |det W|`` in nats, a scalar whose gradient is the transposed inverse. Cost O(D^3).

    >>> linear_log_abs_det(torch.tensor([[2.0, 0.0], [0.0, -0.5]])).item()
    0.0
    """
    return torch.linalg.slogdet(weight).logabsdet


def conv2d_log_abs_det(
    weight: Tensor,
    spatial_shape: tuple[int, int],
    dilation: int,
    groups: int,
    circular: bool,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """``log |det T(w)|`` in nats, a scalar with its exact gradient, computed in ``precision``.

    Zero padding: block elimination and selected inversion, O(H (W C)^3) for 3x3 kernels; dense
    where that is cheaper. Circular padding: by the Fourier transform, O(H W C^3). Never more than
    the convolution's band in memory; see :func:`plan_conv2d`. float32 takes about 0.6 of the time
    of float64, and its relative error is some 1e-6, at most 1e-4 times the condition number.

    Raises:
        MemoryError: there is not enough memory.

    >>> weight = torch.tensor([[[[0.0, 2.0, 1.0]]]], requires_grad=True)
    >>> import math
    >>> value = conv2d_log_abs_det(weight, (4, 64), 1, 1, False)  # of a triangular matrix
    >>> value.backward()
    >>> round(value.item() / math.log(2), 3), weight.grad[0, 0, 0].tolist()
    (256.0, [-63.0, 128.0, 0.0])
    """
    wide = (weight.cpu() if weight.device.type == "mps" else weight).to(precision)
    spatial_shape = (int(spatial_shape[0]), int(spatial_shape[1]))  # traced, no symbols
    if not torch.compiler.is_compiling():  # which cannot ask how much memory there is
        plan = plan_conv2d(tuple(weight.shape), spatial_shape, dilation, groups, circular)
        require_plan(plan, weight, spatial_shape)
    if circular:
        total = fourier_log_abs_det(wide, spatial_shape, dilation, groups)
        return total.to(weight.dtype).to(weight.device)  # in turn: MPS has no float64
    total = wide.new_zeros(())
    for piece in pieces((weight.shape[2], weight.shape[3]), spatial_shape, dilation):
        kernels = piece.kernels(wide, groups)
        layout = layout_of(tuple(kernels.shape), piece.size)
        if layout.blocks == 1:
            matrices = diagonal_block(kernels, piece.size[1], piece.size[0])
            value = torch.linalg.slogdet(matrices).logabsdet.sum()
        else:
            value = _by_elimination(kernels, *piece.size)
        total = total + piece.copies * value
    return total.to(weight.dtype).to(weight.device)


def _by_elimination(kernels: Tensor, height: int, width: int) -> Tensor:
    if func_transforms.active() and not torch.compiler.is_compiling():
        return _ByElimination.apply(kernels, height, width)[0]
    return _exact_log_abs_det(kernels, height, width)[0]


@torch.library.custom_op("snf_ext::exact_log_abs_det", mutates_args=())
def _exact_log_abs_det(kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Sum of ``log |det T|`` over the groups, and its gradient, which costs too much to do later.

    An operator, because tracing cannot see what elimination looks at.
    """
    layout = layout_of(tuple(kernels.shape), (height, width))
    lus = factorize_groups(kernels.detach().cpu(), layout)
    gradient = lus.gradient()
    if layout.transposed:
        gradient = gradient.mT
    return lus.log_abs_det.sum().to(kernels), gradient.contiguous().to(kernels)


@_exact_log_abs_det.register_fake
def _(kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    return kernels.new_empty(()), kernels.new_empty(kernels.shape)


@func_transforms.once_differentiable(
    "the exact log-determinant of a convolution cannot be differentiated twice; "
    "torch.linalg.slogdet(snf_ext.exact.conv2d_matrix(weight, ...)) can"
)
class _Scaled(torch.autograd.Function):
    """``g * gradient``, refusing to be differentiated: the gradient's own is not computed."""

    @staticmethod
    def forward(g: Tensor, gradient: Tensor, kernels: Tensor) -> Tensor:
        return g * gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return func_transforms.run(_Scaled, grad, *ctx.saved_tensors), None, None


@_exact_log_abs_det.register_vmap
def _(info: Any, in_dims: Any, kernels: Tensor, height: int, width: int) -> Any:
    each = [_exact_log_abs_det(k, height, width) for k in kernels.movedim(in_dims[0], 0)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0)


_exact_log_abs_det.register_autograd(_backward, setup_context=_keep)


class _ByElimination(torch.autograd.Function):
    """The operator for transforms of torch.func, which take no gradient of an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        return _exact_log_abs_det(kernels, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs, output)
        ctx.save_for_forward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _backward(ctx, grads[0], grads[1])

    @staticmethod
    def jvp(ctx: Any, kernels: Tensor, *rest: Any) -> tuple[Tensor, None]:
        return (ctx.saved_tensors[0] * kernels).sum(), None
