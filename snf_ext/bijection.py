"""The contract that every part of a flow keeps: a bijection and its one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import passes
from .versions import Versioned


class FlowStep(NamedTuple):
    """What a bijection's ``forward`` returns.

    Attributes:
        z: the output, on the side of the noise.
        log_det: ``log |det dz/dx|`` of each sample in nats, shape ``(B,)``. In training mode the
            self-normalizing layers give it the *value* 0 and the learned inverse's *gradient*.
        recon: squared reconstruction error of each sample by the learned inverse, ``(B,)``;
            zeros where a bijection has no learned inverse.
    """

    z: Tensor
    log_det: Tensor
    recon: Tensor


class Bijection(Versioned):
    """An invertible map. ``forward`` goes from data x to noise z, ``inverse`` back.

    A subclass implements :meth:`forward` and :meth:`inverse`. It overrides
    :meth:`exact_forward` only if its training-mode ``log_det`` is a surrogate,
    :meth:`output_shape` only if it changes the shape of an event, and :meth:`parts` only if it
    holds other bijections; such a one also takes ``refine`` and passes it on (:attr:`refines`). One
    with parameters or buffers has ``reset_parameters``, which starts those of its own anew (not
    those of modules that it holds), so that it can be made on the meta device.
    """

    mixing: ClassVar[bool] = False
    """Whether this is a linear map of all channels or features, whose ``log_det`` is the same for
    every sample: what the log-determinant penalty of :meth:`snf_ext.Flow.loss` is about."""

    refines: ClassVar[bool] = False
    """Whether ``inverse`` takes ``refine``, the number of steps to improve a learned inverse by:
    its own, or those of bijections that it holds."""

    nests: ClassVar[bool] = False
    """Whether ``forward`` is a :func:`push` through bijections that it holds, so that reversible
    training undoes those, one by one."""

    undoes: bool = True
    """Whether :meth:`undo` undoes ``forward``, in training mode too. Where not, or where somebody
    sets it to False on one layer, reversible training keeps the input."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """Map data ``x`` to noise; see :class:`FlowStep`."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """Map noise ``z`` to data; ``exact=True`` by the true inverse, not the learned one."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def undo(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        """The x that ``forward``, in the mode that this is in, made ``z`` of, up to rounding.

        A learned inverse is refined by at most ``refine`` steps, without a wait for a GPU, or with
        ``exact`` the true one is taken. For reversible training, without gradient.
        """
        if self.refines and not exact:
            return self.inverse(z, context, refine=refine)  # type: ignore[call-arg]
        return self.inverse(z, context, exact=True)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """``forward`` with the exact value of ``log_det``, whatever the mode."""
        return self.forward(x, context)

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one output event for an input event of ``event_shape``."""
        return event_shape

    def parts(self, event_shape: tuple[int, ...]) -> Iterator[tuple[Bijection, tuple[int, ...]]]:
        """The simple bijections that this one consists of, each with the shape of its events."""
        yield self, event_shape


def per_sample_sum(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: ``(B, ...) -> (B,)``."""
    return x.flatten(1).sum(1) if x.dim() > 1 else x


def per_sample_zeros(x: Tensor) -> Tensor:
    """Zeros of shape ``(B,)``, in the precision that log-determinants are summed in."""
    return torch.zeros(x.shape[0], dtype=wide_dtype(x.dtype), device=x.device)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-sample sums: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def push(
    bijections: Iterable[Bijection], x: Tensor, context: Tensor | None, exact: bool
) -> FlowStep:
    """``x`` through all bijections, towards noise; ``log_det`` and ``recon`` summed to ``(B,)``.

    ``exact`` takes the exact value of every ``log_det``, in training mode too.
    """
    run = passes.runner()
    if run is not None:
        return run(bijections, x, context, exact)
    z, log_det, recon = x, per_sample_zeros(x), per_sample_zeros(x)
    for bijection in bijections:
        step = bijection.exact_forward(z, context) if exact else bijection(z, context)
        z = step.z
        log_det = log_det + per_sample_sum(step.log_det)
        recon = recon + per_sample_sum(step.recon)
    return FlowStep(z, log_det, recon)


def walk(
    bijections: Iterable[Bijection], event_shape: tuple[int, ...]
) -> Iterator[tuple[Bijection, tuple[int, ...]]]:
    """Every simple bijection at any depth, in order, with the shape of the events it takes."""
    for bijection in bijections:
        yield from bijection.parts(event_shape)
        event_shape = tuple(bijection.output_shape(event_shape))


def pull(
    bijections: Sequence[Bijection],
    z: Tensor,
    context: Tensor | None,
    exact: bool,
    refine: int = 0,
) -> Tensor:
    """``z`` back through all bijections, towards data.

    ``refine`` is passed on to those that take it.
    """
    for bijection in reversed(bijections):
        more: dict[str, Any] = {"refine": refine} if refine and bijection.refines else {}
        z = bijection.inverse(z, context, exact=exact, **more)
    return z
