"""What moves the weight of a layer's reconstruction penalty so that its error stays allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import func_transforms, passes
from .bijection import wide_dtype
from .versions import Versioned

KAPPA = 2e-3
"""The relative error that is allowed if nobody says otherwise: one number for all models of SNF."""

BOUNDS = (1e-2, 1e6)
_MOST = 10.0  # violations count as at most this, so that no update overflows


class Controller(Versioned):
    """What gives one layer its weight lambda of the reconstruction penalty.

    The layer calls it in training mode, and recon comes back times the scalar lambda, in value and
    gradient. If gradients are being recorded, lambda first moves by what the batches so far say of

        error = E||e||^2 / E||x||^2 <= kappa                 e = R W x - x

    A share of the layer's input has no unit: the same kappa is as strict for any layer and data,
    where a tolerance in recon's own would depend on the size of images and the scale of features.

    The state is in buffers: saved and loaded, moved with the layer, changed on its device without
    waiting for it, so that steps can be compiled or captured in a CUDA graph. With
    ``torch.distributed`` in use the sums are those of all ranks, so that all have the same state.
    A batch that is not finite changes nothing.

    Shapes: recon ``(...)``, x ``(..., *event)``; returns ``(...)``.

    Args:
        kappa: the relative error that is allowed.
        recon_weight: lambda at the start.
        ema: what both sums in the error are discounted by with every batch.
        bounds: lambda never leaves them.

    Buffers: ``recon_weight``, lambda; ``sums`` of ``||e||^2`` and ``||x||^2``, discounted. A kind
    may have more.

    Raises:
        ValueError: ``kappa`` or a bound is not positive and finite, ``recon_weight`` is not between
            the bounds, ``ema`` is not in [0, 1).

    Cost: one pass over x and some twenty operations on scalars a step; one ``all_reduce`` of two
    numbers where there are ranks.
    """

    recon_weight: Tensor
    sums: Tensor
    _found: Tensor | None = None  # in the parts of a batch so far
    _moved = False  # by this batch already; see shown_all

    def __init__(
        self,
        kappa: float = KAPPA,
        recon_weight: float = 1.0,
        *,
        ema: float = 0.9,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__()
        low, high = bounds
        if not 0 < low <= high < math.inf:
            raise ValueError(f"bounds must be positive, finite and in order; got {bounds}")
        if not low <= recon_weight <= high:
            raise ValueError(f"recon_weight must lie in the bounds {bounds}; got {recon_weight}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1); got {ema}")
        self.kappa, self.ema, self.bounds = _positive("kappa", kappa), ema, bounds
        self._start: dict[str, Any] = {}
        self._keep(recon_weight=float(recon_weight), sums=[0.0, 0.0])

    def _keep(self, **state: Any) -> None:
        """Buffers that start at these numbers."""
        self._start |= state
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        for name, value in self._start.items():
            getattr(self, name).copy_(torch.tensor(value))

    @property
    def error(self) -> Tensor:
        """The relative error over the last batches, a scalar; nan before the first."""
        return self.sums[0] / self.sums[1]

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        weight = self.recon_weight
        if self.training and self._found is not None:
            self._found += self._sums_of(recon, x)
        elif self.training and torch.is_grad_enabled() and not self._moved:
            if func_transforms.active():  # which leave the layer's state alone
                return recon * weight.to(recon.dtype)
            with torch.no_grad():
                weight = passes.once(self, partial(self._update, recon, x))
        return recon * weight.to(recon.dtype)

    def _update(self, recon: Tensor, x: Tensor) -> Tensor:
        """Take a batch in; lambda, in a tensor of its own that backward can rely on."""
        return self._advance(self._sums_of(recon, x))

    def _sums_of(self, recon: Tensor, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dtype=wide_dtype(x.dtype)).square()
        return torch.stack((recon.sum().to(energy.dtype), energy)).to(self.sums.dtype)

    def _advance(self, found: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
        sums = torch.add(found, self.sums, alpha=self.ema)
        error = sums[0] / sums[1]
        usable = error.isfinite()
        new = {"recon_weight": self.recon_weight, "sums": sums, **self._next(error)}
        for name, value in new.items():
            buffer = getattr(self, name)
            if value is not buffer:
                new[name] = torch.where(usable, value, buffer)
                buffer.copy_(new[name])
        return new["recon_weight"]

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        """New values of buffers, after a batch that left the relative error at ``error``."""
        raise NotImplementedError(f"{type(self).__name__} has no _next")

    def _violation(self, error: Tensor) -> Tensor:
        """``error / kappa - 1``: over 0 where the constraint is violated."""
        return (error / self.kappa - 1).clamp(max=_MOST)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Controller:
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():  # the steps of half precision are too large
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(wide_dtype(buffer.dtype))
        return self

    def extra_repr(self) -> str:
        return f"kappa={self.kappa:g}"


class Fixed(Controller):
    """The same lambda at every step; the error is measured only.

    >>> controller = Fixed(10.0)
    >>> controller(torch.tensor([1.0, 3.0]), torch.ones(2, 5))
    tensor([10., 30.])
    >>> controller.error, controller.recon_weight
    (tensor(0.4000), tensor(10.))
    """

    def __init__(self, recon_weight: float = 1.0, *, ema: float = 0.9) -> None:
        weight = _positive("recon_weight", recon_weight)
        super().__init__(recon_weight=weight, ema=ema, bounds=(weight, weight))

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        return {}

    def extra_repr(self) -> str:
        return f"recon_weight={self.bounds[0]:g}"


class Relative(Controller):
    """Moves lambda, on a logarithmic scale, to where the error is a little under kappa.

        log multiplier += gain * v          v = log(error / (aim * kappa)), clipped to the limits
        log lambda      = log multiplier + damping * v                          within the bounds

    The error of a layer answers to a factor in lambda by a factor, and both go over several powers
    of ten. It answers late: without ``damping``, which raises lambda as soon as the error grows,
    the multiplier would still be on its way down when the inverse is lost. The limits say how fast
    it moves while the error is far off: an inverse is lost sooner than it is found, so that lambda
    falls slowly and rises fast. The bounds hold the multiplier itself, so that it leaves them as
    soon as v changes its sign.

    Args:
        gain: of the multiplier, a step.
        damping: weight of the violation now.
        limits: smallest and largest v.

    Other arguments: :class:`Controller`.

    Buffers: ``multiplier``.

    Raises:
        ValueError: ``gain``, ``damping`` or ``aim`` is not positive and finite, the limits are not
            finite and on either side of 0; see :class:`Controller`.

    >>> controller = Relative(kappa=0.1)
    >>> x = torch.ones(2, 5)
    >>> for recon in (5.0, 0.05):  # ten times too much, then a tenth
    ...     for _ in range(200):
    ...         _ = controller(torch.full((2,), recon), x)
    ...     print(round(controller.recon_weight.log().item()))
    12
    6
    """

    multiplier: Tensor

    def __init__(
        self,
        kappa: float = KAPPA,
        recon_weight: float = 1.0,
        *,
        gain: float = 0.02,
        damping: float = 2.0,
        aim: float = 0.7,
        limits: tuple[float, float] = (-0.5, 2.0),
        ema: float = 0.9,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(kappa, recon_weight, ema=ema, bounds=bounds)
        self.gain, self.damping = _positive("gain", gain), _positive("damping", damping)
        self.aim = _positive("aim", aim)
        least, most = limits
        if not -math.inf < least < 0 < most < math.inf:
            raise ValueError(f"limits must be finite and on either side of 0; got {limits}")
        self.limits = (least, most)
        self._keep(multiplier=float(recon_weight))

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        violation = (error / (self.aim * self.kappa)).clamp(*map(math.exp, self.limits))
        multiplier = (self.multiplier * violation**self.gain).clamp(*self.bounds)
        weight = (multiplier * violation**self.damping).clamp(*self.bounds)
        return {"multiplier": multiplier, "recon_weight": weight}


class GECO(Controller):
    """Multiplies lambda by the exponential of the violation.

        lambda *= exp(rate * (error / kappa - 1))                               within the bounds

    Violations count as at most 10. Satisfied constraints count as -1 at most, so that lambda falls
    slowly, by ``rate`` a step.

    Args:
        rate: of log lambda.

    Other arguments: :class:`Controller`.

    Raises:
        ValueError: ``rate`` is not positive and finite; see :class:`Controller`.

    Source: Rezende and Viola 2018, algorithm 1; SNF A.5, rate 1e-3 and ``ema`` 0.9. SNF's public
    code has no tolerance, so that its multiplier only grows.
    """

    def __init__(
        self,
        kappa: float = KAPPA,
        recon_weight: float = 1.0,
        *,
        rate: float = 1e-3,
        ema: float = 0.9,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(kappa, recon_weight, ema=ema, bounds=bounds)
        self.rate = _positive("rate", rate)

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        factor = (self.rate * self._violation(error)).exp()
        return {"recon_weight": (self.recon_weight * factor).clamp(*self.bounds)}


class ModifiedDifferentialMultipliers(Controller):
    """Gradient ascent on the multiplier, damped by the violation itself.

        multiplier += rate * v                    v = error / kappa - 1, at most 10
        lambda      = multiplier + damping * v                                  within the bounds

    Args:
        rate: of the multiplier; both are in units of lambda.
        damping: weight of the violation now, which keeps the two from circling each other.

    Other arguments: :class:`Controller`.

    Buffers: ``multiplier``, within the bounds too.

    Raises:
        ValueError: ``rate`` or ``damping`` is not positive and finite; see :class:`Controller`.

    Source: Platt and Barr 1988, "Constrained differential optimization", section 3; lambda is what
    their two terms together give the penalty's gradient.
    """

    multiplier: Tensor

    def __init__(
        self,
        kappa: float = KAPPA,
        recon_weight: float = 1.0,
        *,
        rate: float = 0.02,
        damping: float = 1.0,
        ema: float = 0.9,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(kappa, recon_weight, ema=ema, bounds=bounds)
        self.rate, self.damping = _positive("rate", rate), _positive("damping", damping)
        self._keep(multiplier=float(recon_weight))

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        v = self._violation(error)
        multiplier = (self.multiplier + self.rate * v).clamp(*self.bounds)
        weight = (multiplier + self.damping * v).clamp(*self.bounds)
        return {"multiplier": multiplier, "recon_weight": weight}


class AugmentedLagrangian(Controller):
    """The method of multipliers: a multiplier for a while, then a better one.

        lambda = multiplier + penalty * v         v = error / kappa - 1, at most 10

    at every step, and after each ``period`` steps ``multiplier = lambda``; if v is then over a
    quarter of what it was a period before, ``penalty *= growth``. All within the bounds.

    Args:
        penalty: rho at the start, in units of lambda.
        growth: factor of rho.
        period: steps between updates of the multiplier.

    Other arguments: :class:`Controller`.

    Buffers: ``multiplier``; ``penalty``; ``before``, the violation at the last update; ``left``,
    steps to the next.

    Raises:
        ValueError: ``penalty`` is not positive and finite, ``growth`` under 1 or not finite,
            ``period`` no int of at least 1; see :class:`Controller`.

    Source: Hestenes 1969, Powell 1969; for inequalities Nocedal and Wright 2006, section 17.4.
    """

    multiplier: Tensor
    penalty: Tensor
    before: Tensor
    left: Tensor

    def __init__(
        self,
        kappa: float = KAPPA,
        recon_weight: float = 1.0,
        *,
        penalty: float = 1.0,
        growth: float = 1.5,
        period: int = 50,
        ema: float = 0.9,
        bounds: tuple[float, float] = BOUNDS,
    ) -> None:
        super().__init__(kappa, recon_weight, ema=ema, bounds=bounds)
        if not 1 <= growth < math.inf:
            raise ValueError(f"growth must be at least 1 and finite; got {growth}")
        if type(period) is not int or period < 1:
            raise ValueError(f"period must be an int of at least 1; got {period!r}")
        self.growth, self.period = growth, period
        start = {"multiplier": float(recon_weight), "penalty": _positive("penalty", float(penalty))}
        self._keep(**start, before=_MOST, left=period)

    def _next(self, error: Tensor) -> dict[str, Tensor]:
        v = self._violation(error)
        weight = (self.multiplier + self.penalty * v).clamp(*self.bounds)
        left = self.left - 1
        due = left == 0
        slow = due & (v > 0.25 * self.before.clamp(min=0))
        return {
            "recon_weight": weight,
            "multiplier": torch.where(due, weight, self.multiplier),
            "penalty": torch.where(slow, self.growth * self.penalty, self.penalty).clamp(
                max=self.bounds[1]
            ),
            "before": torch.where(due, v, self.before),
            "left": torch.where(due, self.period, left),
        }


CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "relative": Relative,
    "geco": GECO,
    "augmented-lagrangian": AugmentedLagrangian,
    "differential-multipliers": ModifiedDifferentialMultipliers,
}
"""By the names that the command line has; made from ``kappa`` and ``recon_weight``."""


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")
    return value
