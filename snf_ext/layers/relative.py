"""The linear layer that is trained by the relative gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import func_transforms
from ..bijection import FlowStep, wide_dtype
from ..reference.autocast import widened_under_autocast, without_autocast
from .one_weight import OneWeight


class _RelativeLinear(torch.autograd.Function):
    generate_vmap_rule = True
    forward_mode = (
        "RelativeLinear has no forward-mode derivatives: the gradient of its weight is the "
        "relative one; take grad, vjp or jacrev"
    )

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y = F.linear(x, weight)
        log_det = x.new_zeros(x.shape[:-1], dtype=wide_dtype(x.dtype))
        return (y.clone() if bias is None else y + bias), log_det, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        return func_transforms.run(_Gradient, *grad_outputs[:2], *ctx.saved_tensors, wanted)


@func_transforms.once_differentiable(
    "double backward through RelativeLinear is not supported: the gradient of its weight is the "
    "relative one, no derivative"
)
class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_z: Tensor, grad_log_det: Tensor, weight: Tensor, y: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        features = weight.shape[0]
        delta, rows = grad_z.reshape(-1, features), y.reshape(-1, features)
        grad_x = grad_weight = grad_bias = None
        with without_autocast(y.device):
            if wanted[0]:
                grad_x = (delta @ weight).reshape(y.shape)
            if wanted[1]:
                # (delta x' + S W^-T) W'W = delta (y W) + S W: the inverse is gone.
                grad_weight = delta.T @ (rows @ weight) + (grad_log_det.sum() * weight).to(weight)
            if wanted[2]:
                grad_bias = delta.sum(0)
        return grad_x, grad_weight, grad_bias


def relative_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z = W x + c`` and a ``log_det`` of value 0, with the relative gradient of W.

    Shapes: x ``(..., D)``, weight ``(D, D)``, bias ``(D,)``; z as x, ``log_det`` ``(...)``. Under
    autocast all is float32, as in the self-normalizing layers.

    >>> weight = torch.eye(2).mul(2).requires_grad_()
    >>> z, log_det = relative_linear(torch.ones(1, 2), weight, None)
    >>> log_det.sum().backward()
    >>> weight.grad  # W^-T W'W = W
    tensor([[2., 0.],
            [0., 2.]])
    """
    tensors = widened_under_autocast(x, weight, bias)
    with without_autocast(x.device):
        z, log_det, _ = func_transforms.run(_RelativeLinear, *tensors)
    return z, log_det


class RelativeLinear(OneWeight):
    """Linear map ``z = W x + c`` whose weight is trained by the relative gradient.

    What ``weight.grad`` receives is the exact gradient of the loss times ``W'W``, which needs no
    inverse: with ``d = dL/dz``, ``y = W x`` and S the sum of ``dL/dlog_det`` over the batch,
    ``sum_b d (W'y)' + S W``. The gradients of x and c are the true ones. ``log_det`` is as in
    :class:`SelfNormLinear`: value 0 in training, exact in evaluation, the same gradient in both.

    Shapes: x ``(..., D)``, z the same, ``log_det`` and ``recon`` (zeros) ``(...)``.

    Args:
        features: D.
        bias: whether there is a c.

    Parameters: ``weight`` W ``(D, D)``, started at the identity plus Xavier-normal noise of gain
    0.01; ``bias`` c ``(D,)``, started at 0, or None.

    Cost: O(B D^2) in training, four products; O(D^3) once per weight for exact values and for the
    inverse. Source: Gresele et al. 2020, "Relative gradient optimization of the Jacobian term in
    unsupervised deep learning".

    >>> layer = RelativeLinear(4)
    >>> z, log_det, recon = layer(torch.randn(7, 4))
    >>> log_det.tolist() == [0.0] * 7
    True
    >>> layer.eval()(torch.randn(1, 4)).log_det.item() == layer.log_abs_det().item()
    True
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return self._step(x) if self.training else self.exact_forward(x)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        z, log_det, recon = self._step(x)
        return FlowStep(z, log_det + self._factorization().log_abs_det.to(log_det), recon)

    def _step(self, x: Tensor) -> FlowStep:
        self._check(x, "x")
        z, log_det = relative_linear(x, self.weight, self.bias)
        return FlowStep(z, log_det, torch.zeros_like(log_det))
