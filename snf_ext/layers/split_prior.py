"""Multi-scale flows: half of the channels leave early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..bijection import Bijection, FlowStep, pull, push, walk
from .coupling import AdditiveCoupling, AffineCoupling
from .event import check_events, checked_event_shape


class SplitPrior(Bijection):
    """Half of the channels become noise here, the others go on through the bijections ``rest``.

    With x1 the first ``C // 2`` channels and x2 the others,

        x1, x2 = coupling(x1, x2)            (unless unconditional)
        z = [rest(x1), x2], each flattened

    so x2 is standard normal given x1, with the coupling's mean and scale. As the result is one
    vector, the flow's base, sampling temperature and inversion need no special case.

    Shapes: x ``(B, C, H, W)``, z ``(B, D)`` with D = C H W, ``log_det`` and ``recon`` ``(B,)``.

    Args:
        event_shape: ``(C, H, W)``.
        rest: bijections on events of ``(C // 2, H, W)``; none is allowed.
        width: hidden channels of the coupling's network.
        conditional: whether there is a coupling.
        additive: x2's mean alone depends on x1.
        context_features: K, the size of the coupling's context ``(B, K)``.

    Raises:
        ValueError: C is less than 2, or x or z has the wrong shape.

    Source: Dinh et al. 2016, "Real NVP", section 3.6; SNF A.3.

    >>> import snf_ext
    >>> f = SplitPrior((4, 6, 6), [snf_ext.Squeeze(), snf_ext.ActNorm(8)], width=8)
    >>> x = torch.randn(5, 4, 6, 6)
    >>> f(x).z.shape, torch.allclose(f.inverse(f.eval()(x).z), x, atol=1e-5)
    (torch.Size([5, 144]), True)
    """

    refines = True
    nests = True

    def __init__(
        self,
        event_shape: tuple[int, ...],
        rest: Iterable[Bijection],
        width: int = 512,
        *,
        conditional: bool = True,
        additive: bool = False,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.event_shape = checked_event_shape(event_shape)
        if len(self.event_shape) != 3 or self.event_shape[0] < 2:
            raise ValueError(
                "event_shape must be (C, H, W) with at least 2 channels; "
                f"got {list(self.event_shape)}"
            )
        channels, *image = self.event_shape
        self.coupling: Bijection | None = None
        if conditional:
            make = AdditiveCoupling if additive else AffineCoupling
            self.coupling = make(channels, width, context_features=context_features)
        elif additive or context_features:
            raise ValueError("additive and context_features must be left out if not conditional")
        self.rest = nn.ModuleList(rest)
        self.first_shape: tuple[int, ...] = (channels // 2, *image)
        self.second_shape: tuple[int, ...] = (channels - channels // 2, *image)
        shape = self.first_shape
        for bijection in self._steps():
            shape = tuple(bijection.output_shape(shape))
        self.rest_shape = shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return self._forward(x, context, exact=False)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return self._forward(x, context, exact=True)

    def _forward(self, x: Tensor, context: Tensor | None, exact: bool) -> FlowStep:
        check_events(x, "x", self.event_shape)
        whole, log_det, recon = push(self._before(), x, context, exact)
        first, second = whole.split((self.first_shape[0], self.second_shape[0]), 1)
        step = push(self._steps(), first, context, exact)
        z = torch.cat((_vectors(step.z), _vectors(second)), 1)
        return FlowStep(z, log_det + step.log_det, recon + step.recon)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        sizes = (math.prod(self.rest_shape), math.prod(self.second_shape))
        check_events(z, "z", (sum(sizes),))
        first, second = z.split(sizes, 1)
        batch = z.shape[0]
        first = first.reshape(batch, *self.rest_shape)
        first = pull(self._steps(), first, context, exact, refine)
        whole = torch.cat((first, second.reshape(batch, *self.second_shape)), 1)
        return pull(self._before(), whole, context, exact, refine)

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(event_shape),)

    def parts(self, event_shape: tuple[int, ...]) -> Iterator[tuple[Bijection, tuple[int, ...]]]:
        yield from walk(self._before(), event_shape)
        yield from walk(self._steps(), self.first_shape)

    def _before(self) -> list[Bijection]:
        return [] if self.coupling is None else [self.coupling]

    def _steps(self) -> list[Bijection]:
        return list(self.rest)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.event_shape}"


def _vectors(x: Tensor) -> Tensor:
    """``(B, ...) -> (B, D)``, for an empty batch too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
