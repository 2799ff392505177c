"""Transforms of torch.distributions, and of what is built on it, as bijections."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, constraints

from ..bijection import Bijection, FlowStep, per_sample_sum, per_sample_zeros, wide_dtype


class TransformBijection(Bijection):
    """``z = t(x)`` for a ``torch.distributions.Transform`` t: torch's, zuko's or Pyro's.

    The way back is :class:`snf_ext.BijectionTransform`. Tensors in t are no parameters here: they
    are neither moved nor saved with the module, though they get gradients; zuko's lazy
    transforms have parameters (:class:`ZukoBijection`). Both inverses are ``t.inv``.

    Shapes: x ``(B, ...)`` as t takes it, z as t gives it, ``log_det`` ``(B,)`` in nats.

    Args:
        transform: t, bijective; ``t.inv`` for its inverse.

    Attributes:
        domain: t's constraint on x; a flow that begins with t has it as its support.

    Raises:
        TypeError: ``transform`` is no Transform.
        ValueError: it is not bijective, or x has fewer dimensions than its events and a batch.

    >>> import torch
    >>> from torch.distributions.transforms import SigmoidTransform
    >>> f = TransformBijection(SigmoidTransform().inv)  # from (0, 1) to the real numbers
    >>> z, log_det, _ = f(torch.full((1, 2), 0.5))
    >>> z.tolist(), round(log_det.item(), 4)  # 2 log 4
    ([[0.0, 0.0]], 2.7726)
    """

    undoes = False  # as precise as t is

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transform must be a torch.distributions.Transform; got {type(transform).__name__}"
            )
        if not transform.bijective:
            raise ValueError(f"transform must be bijective; got {transform}")
        self.transform = transform

    @property
    def domain(self) -> constraints.Constraint:
        return self.transform.domain

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        t: Any = self.transform
        least = t.domain.event_dim + 1
        if x.dim() < least:
            raise ValueError(
                f"x must have a batch and the {least - 1} dimensions of the transform's events; "
                f"got {list(x.shape)}"
            )
        if hasattr(t, "call_and_ladj"):  # in one pass, as zuko's do
            z, log_det = t.call_and_ladj(x)
        else:
            z = t(x)
            log_det = t.log_abs_det_jacobian(x, z)
        zeros = per_sample_zeros(x)
        return FlowStep(z, zeros + per_sample_sum(log_det.to(wide_dtype(x.dtype))), zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        x: Tensor = self.transform.inv(z)
        return x

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.transform.forward_shape(event_shape))

    def extra_repr(self) -> str:
        return repr(self.transform)
