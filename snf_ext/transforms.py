"""Bijections as transforms of torch.distributions, and what its distributions ask of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from .bijection import Bijection, FlowStep, pull, push, walk
from .implicit import exact_inverse
from .layers import (
    ActNorm,
    Dequantize,
    Flatten,
    Logit,
    Normalize,
    Permutation,
    Squeeze,
    Tracked,
    Unsqueeze,
    VariationalDequantize,
)
from .layers.learned_inverse import LearnedInverse

_ELEMENTS_KEPT = (Normalize, Flatten, Permutation, Squeeze, Unsqueeze)
"""Bijections that take an event of equal elements to one."""


class BijectionTransform(Transform):
    """A bijection as a ``torch.distributions.Transform``: called, it goes from x to z.

    That is the direction of ``Bijection.forward``, from data to noise; ``.inv`` leads from noise to
    data and is what a ``TransformedDistribution`` over a normal base wants for a density of data.
    As it stands, noise goes *forward* into samples, one pass each, which suits
    variational inference. ``log_abs_det_jacobian`` is exact in training mode too; gradients of
    parameters are those of ``Bijection.exact_forward``, which for a self-normalizing weight are the
    learned inverse's.

    Shapes: x ``(*, *event_shape)``, z ``(*, *latent_shape)``, context ``(*, K)``, log-determinants
    ``(*)`` in nats; leading dimensions are broadcast.

    Args:
        bijection: one, or several in the order from data to noise.
        event_shape: of one x.
        context: for bijections that take one.
        context_dims: number of dimensions of the context of one sample: 3 for maps ``(K, H, W)``.
        exact: whether ``.inv`` is the true inverse, differentiable in the parameters, or the
            learned one, which undoes a call only as well as it has been learned.
        cache_size: 1 to keep the last x, z and log-determinant, as torch's transforms do:
            ``log_prob`` of a sample just drawn then inverts nothing. To be used before a weight
            changes.

    The parameters stay those of the bijection, which is what an optimizer is given. A
    tracked inverse (``inverse="tracked"``) is fitted whenever gradients are taken in
    training mode; that of a layer with a penalty needs it added to the loss.

    Raises:
        NotImplementedError: the bijection draws noise (:class:`Dequantize`,
            :class:`VariationalDequantize`): its forward is no function.
        ValueError: x, z or the context has another shape; a layer has no inverse.

    Cost: a forward pass, with the log-determinant's O(D³) once a weight of a linear layer; ``.inv``
    with gradients that of :func:`snf_ext.implicit.exact_inverse`.

    >>> import snf_ext
    >>> from torch.distributions import Independent, Normal, TransformedDistribution
    >>> layer = snf_ext.SelfNormLinear(3, inverse="tracked")
    >>> t = snf_ext.BijectionTransform(layer, (3,))
    >>> base = Independent(Normal(torch.zeros(3), 1.0), 1)
    >>> density = TransformedDistribution(base, t.inv)
    >>> flow = snf_ext.Flow([layer], (3,))
    >>> x = density.rsample((5,))
    >>> torch.allclose(density.log_prob(x), flow.log_prob(x), atol=1e-5)
    True
    """

    bijective = True

    def __init__(
        self,
        bijection: Bijection | Iterable[Bijection],
        event_shape: tuple[int, ...],
        context: Tensor | None = None,
        *,
        context_dims: int = 1,
        exact: bool = True,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size)
        self.bijections = (bijection,) if isinstance(bijection, Bijection) else tuple(bijection)
        self.event_shape = latent = tuple(event_shape)
        for part in self.bijections:
            latent = tuple(part.output_shape(latent))
        self.latent_shape = latent
        self.context, self.context_dims, self.exact = context, context_dims, exact
        elements = elements_of(self.bijections, self.event_shape)
        if elements.is_discrete:
            raise NotImplementedError(
                "bijection must be a function to be a Transform; got one that draws noise to "
                "dequantize: leave that layer out and dequantize the data, or take "
                "Flow.as_distribution"
            )
        self._domain = constraints.independent(elements, len(self.event_shape))
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # x, z, log_det

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Where x lives: the real numbers, or an interval for each element."""
        return self._domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Where z lives: the real numbers."""
        return constraints.independent(constraints.real, len(self.latent_shape))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and ``log |det dz/dx|``, in one pass."""
        flat, context, lead = self._flat(x, self.event_shape, "x")
        step = self._step(flat, context)
        z = step.z.reshape(*lead, *self.latent_shape)
        return z, self._keep(x, z, step.log_det.reshape(lead))

    def inv_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and ``log |det dz/dx|`` there, in one pass each way."""
        flat, context, lead = self._flat(z, self.latent_shape, "z")
        if self.exact:
            prepare(self.bijections, self.event_shape, backwards=True)
            x, log_det = exact_inverse(self.bijections, flat, context)
        else:
            x = pull(self.bijections, flat, context, exact=False)
            log_det = self._step(x, context).log_det
        x = x.reshape(*lead, *self.event_shape)
        return x, self._keep(x, z, log_det.reshape(lead))

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, z: Tensor) -> Tensor:
        if self.exact and torch.is_grad_enabled():
            return self.inv_and_ladj(z)[0]
        flat, context, lead = self._flat(z, self.latent_shape, "z")
        x = pull(self.bijections, flat, context, exact=self.exact)
        return x.reshape(*lead, *self.event_shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dz/dx|`` at x, in nats."""
        if self._kept is not None and x is self._kept[0] and y is self._kept[1]:
            return self._kept[2]
        return self.call_and_ladj(x)[1]

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return self._shape(shape, self.event_shape, self.latent_shape, "x")

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return self._shape(shape, self.latent_shape, self.event_shape, "z")

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        if cache_size == self._cache_size:
            return self
        other = copy.copy(self)
        Transform.__init__(other, cache_size)
        other._kept = None
        return other

    def __repr__(self) -> str:
        names = ", ".join(type(part).__name__ for part in self.bijections)
        return f"{type(self).__name__}({names}, event_shape={self.event_shape}, exact={self.exact})"

    def _step(self, x: Tensor, context: Tensor | None) -> FlowStep:
        prepare(self.bijections, self.event_shape)
        return push(self.bijections, x, context, exact=True)

    def _keep(self, x: Tensor, z: Tensor, log_det: Tensor) -> Tensor:
        if self._cache_size:
            self._kept = x, z, log_det
        return log_det

    def _shape(
        self, shape: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...], name: str
    ) -> torch.Size:
        return torch.Size(
            (*torch.broadcast_shapes(leading(shape, old, name), self._of_context()), *new)
        )

    def _of_context(self) -> tuple[int, ...]:
        """The leading dimensions of the context."""
        if self.context is None:
            return ()
        return tuple(self.context.shape[: self.context.dim() - self.context_dims])

    def _flat(
        self, x: Tensor, event_shape: tuple[int, ...], name: str
    ) -> tuple[Tensor, Tensor | None, torch.Size]:
        """One batch dimension in place of any number, for x and for the context."""
        lead = torch.broadcast_shapes(leading(x.shape, event_shape, name), self._of_context())
        return (
            flattened(x, lead, len(event_shape)),
            flattened(self.context, lead, self.context_dims),
            lead,
        )


def elements_of(
    bijections: Iterable[Bijection], event_shape: tuple[int, ...]
) -> constraints.Constraint:
    """What an element of an event may be: a level, a number of an interval, or any number."""
    passed: list[Bijection] = []
    for bijection in bijections:
        if isinstance(bijection, (Dequantize, VariationalDequantize)):
            return constraints.integer_interval(0, bijection.levels - 1)
        own = getattr(bijection, "domain", None)  # of a transform of others
        if own is not None and not passed:
            return getattr(own, "base_constraint", own)
        passed.append(bijection)
        event_shape = tuple(bijection.output_shape(event_shape))
        if isinstance(bijection, Logit):
            ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
            events = ends.view(-1, *(1,) * len(event_shape)).expand(-1, *event_shape)
            bounds = pull(passed, events, None, exact=True)
            return constraints.interval(bounds.min().item(), bounds.max().item())
        if not isinstance(bijection, _ELEMENTS_KEPT):
            break
    return constraints.real


def prepare(
    bijections: Iterable[Bijection], event_shape: tuple[int, ...], backwards: bool = False
) -> None:
    """What exact passes leave to training's own: where gradients are taken, tracked inverses are
    fitted, for no more than the factorisation that an exact value takes."""
    if not torch.is_grad_enabled():
        return
    for part, shape in walk(bijections, event_shape):
        if isinstance(part, LearnedInverse) and isinstance(part.upkeep, Tracked):
            if part.training and part.weight.requires_grad:
                part.fit_inverse(shape[1:])  # type: ignore[operator]
        elif backwards and isinstance(part, ActNorm) and part.training and not part.initialized:
            raise RuntimeError(
                "ActNorm must have started before samples are differentiated, as it starts from "
                "data: see snf_ext.initialize"
            )


def leading(shape: Sequence[int], event_shape: Sequence[int], name: str) -> tuple[int, ...]:
    """What stands before the event's dimensions in ``shape``."""
    cut = len(shape) - len(event_shape)
    if cut < 0 or tuple(shape[cut:]) != tuple(event_shape):
        want = ", ".join(map(str, event_shape))
        raise ValueError(f"{name} must have shape [..., {want}]; got {list(shape)}")
    return tuple(shape[:cut])


@overload
def flattened(x: Tensor, lead: Sequence[int], dims: int) -> Tensor: ...
@overload
def flattened(x: Tensor | None, lead: Sequence[int], dims: int) -> Tensor | None: ...
def flattened(x: Tensor | None, lead: Sequence[int], dims: int) -> Tensor | None:
    """One batch dimension in place of ``lead``, which those before the last ``dims`` expand to."""
    if x is None:
        return None
    event = x.shape[x.dim() - dims :]
    return x.expand(*lead, *event).reshape(math.prod(lead), *event)
