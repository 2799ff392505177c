"""Batch normalisation as a flow."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from .. import func_transforms, passes
from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from .event import check_channels, checked_size


class BatchNorm(Bijection):
    """``z = (x - mean) exp(log_scale) / sqrt(var + eps) + shift`` for each channel.

    ``forward`` in training mode takes mean and variance (over n, not n - 1) of the batch, and its
    ``log_det`` is that of the map with these numbers, for each sample. Everything else takes the
    running ones: ``forward`` in evaluation mode, ``exact_forward`` and so a likelihood, and
    ``inverse``. Samples thus come from the density that ``log_prob`` gives, and in training mode
    ``inverse`` does not undo ``forward``.

    Shapes: x ``(B, C, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        channels: C.
        momentum: weight of a batch in the running mean and variance, in (0, 1].
        eps: added to the variance.

    Parameters: ``log_scale`` and ``shift`` of ``(C,)``, started at 0. Buffers: ``running_mean``,
    started at 0, and ``running_var``, started at 1.

    Raises:
        ValueError: a setting is out of range, x has other channels, or in training mode x has one
            value a channel.

    Source: NNN 76-78; Papamakarios et al. 2017.

    >>> f = BatchNorm(2)
    >>> z = f(3 + 5 * torch.randn(8, 2, 4, 4)).z
    >>> z.mean().abs() < 1e-5, z.std().round(decimals=1).item()
    (tensor(True), 1.0)
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum}")
        if not eps > 0:
            raise ValueError(f"eps must be positive; got {eps}")
        self.channels = checked_size("channels", channels)
        self.momentum, self.eps = momentum, eps
        self.log_scale = nn.Parameter(torch.empty(channels))
        self.shift = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, the running mean and variance too."""
        for tensor in (self.log_scale, self.shift, self.running_mean):
            tensor.zero_()
        self.running_var.fill_(1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_channels(x, "x", self.channels)
        if not self.training or x.numel() == 0:
            return self.exact_forward(x)
        if x.numel() == self.channels:
            raise ValueError(
                f"x must have more than one value a channel in training mode; got {list(x.shape)}"
            )
        if func_transforms.active():
            raise NotImplementedError(
                "BatchNorm in training mode moves its running mean and variance, which the "
                "transforms of torch.func do not allow; call eval() on it first"
            )
        others = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.to(wide_dtype(x.dtype)), others, correction=0)
        passes.once(self, partial(self._follow, mean.detach(), var.detach()))
        return self._normalize(x, mean, var)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_channels(x, "x", self.channels)
        return self._normalize(x, self.running_mean, self.running_var)

    def _follow(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch's numbers into the running ones; the former."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        return mean, var

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        check_channels(z, "z", self.channels)
        return self._denormalize(z, self.running_mean, self.running_var)

    def undo(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        numbers = passes.recalled(self)  # of the batch, in training mode
        return self.inverse(z) if numbers is None else self._denormalize(z, *numbers)

    def _denormalize(self, z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        log_scale = self._log_scale(z, var)
        v = z.to(log_scale.dtype) - _per_channel(self.shift, z)
        x = v * _per_channel(-log_scale, z).exp() + _per_channel(mean, z)
        return x.to(z.dtype)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> FlowStep:
        log_scale = self._log_scale(x, var)
        v = x.to(log_scale.dtype) - _per_channel(mean, x)
        z = v * _per_channel(log_scale, x).exp() + _per_channel(self.shift, x)
        zeros = per_sample_zeros(x)
        return FlowStep(z.to(x.dtype), zeros + math.prod(x.shape[2:]) * log_scale.sum(), zeros)

    def _log_scale(self, x: Tensor, var: Tensor) -> Tensor:
        """Logarithm of the whole scale, ``(C,)``, in float32 or wider."""
        wide = wide_dtype(x.dtype)
        return self.log_scale.to(wide) - 0.5 * torch.log(var.to(wide) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, momentum={self.momentum}, eps={self.eps}"


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """``vector`` ``(C,)`` in the shape that goes with ``x`` ``(B, C, ...)``, float32 or wider."""
    return vector.to(wide_dtype(x.dtype)).view(-1, *(1,) * (x.dim() - 2))
