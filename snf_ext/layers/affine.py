"""An affine map of each element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bijection import Bijection, FlowStep, per_sample_sum, per_sample_zeros, wide_dtype
from ..reference.elementwise import LOG_SCALE_BOUND
from .event import check_context, check_events, checked_event_shape, checked_size
from .initial import ZeroLinear


class ComponentwiseAffine(Bijection):
    """``z = exp(log_scale) x + shift``, element by element, with parameters of their own.

    With a context c, ``2 tanh((A c) / 2)`` is added to ``log_scale`` and ``B c`` to ``shift``; A
    and B start at zero.

    Shapes: x ``(B, *event_shape)``, z the same, ``log_det`` ``(B,)``.

    Args:
        event_shape: shape of one event.
        context_features: K; 0 for none. A context is ``(B, K)``.

    Parameters: ``log_scale`` and ``shift`` of ``event_shape``, started at 0; with a context
    ``from_context``, a linear map from K to A c and B c.

    Raises:
        ValueError: x has the wrong shape; the context is missing, not expected, or of the wrong
            shape.

    Source: NNN 10.3; Real NVP's bound on what depends on the context.

    >>> f = ComponentwiseAffine((2, 3))
    >>> f(torch.ones(4, 2, 3)).log_det.tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, event_shape: tuple[int, ...], context_features: int = 0) -> None:
        super().__init__()
        self.event_shape = checked_event_shape(event_shape)
        self.context_features = checked_size("context_features", context_features, 0)
        self.log_scale = nn.Parameter(torch.empty(self.event_shape))
        self.shift = nn.Parameter(torch.empty(self.event_shape))
        self.from_context: ZeroLinear | None = None
        if context_features:
            # No bias: log_scale and shift are it.
            outputs = 2 * self.log_scale.numel()
            self.from_context = ZeroLinear(context_features, outputs, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, at the identity."""
        self.log_scale.zero_()
        self.shift.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_events(x, "x", self.event_shape)
        log_scale, shift = self._scale_and_shift(x, context)
        z = x.to(log_scale.dtype) * log_scale.exp() + shift
        return FlowStep(z.to(x.dtype), per_sample_sum(log_scale), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        check_events(z, "z", self.event_shape)
        log_scale, shift = self._scale_and_shift(z, context)
        return ((z.to(log_scale.dtype) - shift) * (-log_scale).exp()).to(z.dtype)

    def _scale_and_shift(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """log_scale and shift of every sample, ``(B, *event_shape)``, in float32 or wider."""
        check_context(context, x.shape[0], self.context_features)
        wide = wide_dtype(x.dtype)
        log_scale, shift = self.log_scale.to(wide), self.shift.to(wide)
        if self.from_context is None or context is None:
            return log_scale.expand(x.shape), shift.expand(x.shape)
        terms = self.from_context(context.to(self.log_scale.dtype)).to(wide)
        raw, more = terms.unflatten(1, (2, *self.event_shape)).unbind(1)
        bounded = LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)
        return log_scale + bounded, shift + more

    def extra_repr(self) -> str:
        text = f"{self.event_shape}"
        return text + f", context_features={self.context_features}" * bool(self.context_features)
