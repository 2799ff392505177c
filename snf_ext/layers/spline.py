"""The spline activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_zeros
from ..own_parameters import assign_
from .event import checked_event_shape


class RationalQuadraticSpline(Bijection):
    """Monotone rational-quadratic spline on ``[-T, T]``, the identity outside, element by element.

    Every element of an event has K bins of its own: 3K - 1 parameters each. The equation is that
    of :func:`snf_ext.reference.rq_spline`.

    Shapes: x ``(B, *event_shape)``, z the same, ``log_det`` ``(B,)``.

    Args:
        event_shape: shape of one event.
        bins: K, 1 to 999.
        tail_bound: T, in [1e-30, 1e30].

    Parameters: ``widths`` and ``heights`` of ``(*event_shape, K)``, ``derivatives`` of
    ``(*event_shape, K - 1)``, before softmax and softplus; they start at 0.01 N(0, 1), which is
    near the identity.

    Raises:
        ValueError: ``bins`` or ``tail_bound`` is out of range, or x has the wrong shape.

    Cost: O(D K) a step for the tables and O(B D).
    Source: Durkan et al. 2019, "Neural Spline Flows"; SNF A.3 with K = 5 and T = 10.

    >>> f = RationalQuadraticSpline((2, 3))
    >>> sum(p.numel() for p in f.parameters()) // 6
    14
    >>> x = torch.tensor([[[-20.0, 0.0, 1.0], [10.0, 20.0, 3.0]]])
    >>> torch.allclose(f.inverse(f(x).z), x, atol=1e-5)
    True
    """

    def __init__(
        self, event_shape: tuple[int, ...], bins: int = 5, tail_bound: float = 10.0
    ) -> None:
        super().__init__()
        if not 1 <= bins <= 999:
            raise ValueError(f"bins must be 1 to 999; got {bins}")
        if not 1e-30 <= tail_bound <= 1e30:
            raise ValueError(f"tail_bound must be in [1e-30, 1e30]; got {tail_bound}")
        self.event_shape = checked_event_shape(event_shape)
        self.bins, self.tail_bound = bins, float(tail_bound)
        self.widths = nn.Parameter(torch.empty(*self.event_shape, bins))
        self.heights = nn.Parameter(torch.empty(*self.event_shape, bins))
        self.derivatives = nn.Parameter(torch.empty(*self.event_shape, bins - 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, near the identity."""
        for raw in (self.widths, self.heights, self.derivatives):
            assign_(
                raw, torch.empty(raw.shape, dtype=raw.dtype, device=raw.device).normal_(std=0.01)
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return FlowStep(*self._apply_spline(x, inverse=False), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return self._apply_spline(z, inverse=True)[0]

    def _apply_spline(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.rq_spline(
            x, self.widths, self.heights, self.derivatives, self.tail_bound, inverse
        )

    def extra_repr(self) -> str:
        return f"{self.event_shape}, bins={self.bins}, tail_bound={self.tail_bound:g}"
