"""Flows as distributions of torch.distributions.

Values are exact, whatever the mode of the modules: ``log_prob`` is the density of what ``sample``
draws, unless ``exact=False`` asks for the learned inverses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from . import ops
from .bijection import Bijection
from .flow import Flow
from .implicit import exact_inverse
from .transforms import elements_of, flattened, leading, prepare


class FlowDistribution(Distribution):
    """What :meth:`snf_ext.Flow.as_distribution` gives: the density of a flow.

    ``log_prob`` is the exact one of ``Flow.log_prob``, in training mode too. With ``exact`` samples
    are pulled back by the true inverses and are samples of that density, and ``rsample`` is
    differentiable in the parameters and the context. By the learned inverses (``exact=False``)
    they are samples of a density nobody can write down: near that of ``log_prob`` as far as the
    inverses are learned, and no ground for an evidence bound or an importance weight.

    Shapes: without a context ``batch_shape`` is ``()``; a context ``(*, K)`` gives ``(*)``. Samples
    ``(*sample_shape, *batch_shape, *event_shape)``, ``log_prob`` in nats.

    Support: real numbers; an interval where the flow begins with a logit; for a flow that
    dequantizes the integers that it takes, whose ``log_prob`` then draws its noise and is a lower
    bound in expectation. Such a one has no ``rsample``.

    Training by this: a tracked inverse (``inverse="tracked"``) is fitted whenever gradients are
    taken in training mode. Layers with a penalty need ``flow(x).recon`` in the loss, or else
    nothing keeps their inverse; :meth:`snf_ext.Flow.loss` has it. Mean and variance are not known.

    Args:
        flow: a :class:`snf_ext.Flow`; its parameters stay where they are.
        context: ``(*, K)`` for a conditional flow.
        exact: sample by the true inverses, rather than by the learned ones.
        validate_args: as in torch.distributions.

    Raises:
        TypeError: ``flow`` is no Flow.
        ValueError: the context or a value does not fit; a layer has no inverse.

    Cost: that of :meth:`snf_ext.Flow.sample` and :meth:`snf_ext.Flow.log_prob`; ``rsample`` as
    :func:`snf_ext.implicit.exact_inverse`.

    >>> import snf_ext
    >>> layers = [snf_ext.SelfNormLinear(2), snf_ext.AffineCoupling(2, 8, mask="vector")]
    >>> q = snf_ext.Flow(layers, (2,)).as_distribution()
    >>> x, log_q = q.rsample_and_log_prob((5,))
    >>> x.shape, torch.allclose(q.log_prob(x), log_q, atol=1e-5)
    (torch.Size([5, 2]), True)
    """

    arg_constraints = {}  # noqa: RUF012 (torch's)

    def __init__(
        self,
        flow: Flow,
        context: Tensor | None = None,
        exact: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a snf_ext.Flow; got {type(flow).__name__}")
        features = flow.context_features
        if context is not None and (context.dim() < 1 or context.shape[-1] != features):
            raise ValueError(
                f"context must have shape [..., K] with K = {features}; got {list(context.shape)}"
            )
        if features and context is None:
            raise ValueError(f"context must have shape [..., K] with K = {features}; got none")
        self.flow, self.context, self.exact = flow, context, exact
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where events live."""
        elements = elements_of(_parts(self.flow), self.flow.event_shape)
        return constraints.independent(elements, len(self.flow.event_shape))

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples have gradients: not those of integers."""
        return not self.support.is_discrete

    def expand(
        self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        """The same with another ``batch_shape``, which the old one broadcasts to."""
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.flow, new.exact, new.context = self.flow, self.exact, self.context
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, self.context.shape[-1])
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Samples without gradient, ``(*sample_shape, *batch_shape, *event_shape)``."""
        noise, context, shape = self._noise(sample_shape)
        return self.flow.inverse(noise, context, exact=self.exact).reshape(shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Samples with gradients, of the parameters and the context.

        Raises:
            NotImplementedError: the flow is one of integers.
            RuntimeError: an :class:`ActNorm` in training mode has not started.
        """
        self._check_rsample()
        noise, context, shape = self._noise(sample_shape)
        if self.exact and torch.is_grad_enabled():
            return self._undone(noise, context)[0].reshape(shape)
        return self.flow.inverse(noise, context, exact=self.exact).reshape(shape)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = torch.Size()
    ) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`rsample` gives them, and their ``log_prob``: what reverse KL wants.

        The log-density comes from the noise that the samples were made of and the pass that their
        gradients need anyway; nothing is inverted or pushed twice.

        Raises:
            NotImplementedError, RuntimeError: as :meth:`rsample`.

        >>> import snf_ext
        >>> target = torch.distributions.Normal(torch.tensor([1.0, -1.0]), 0.5)
        >>> flow = snf_ext.Flow([snf_ext.ComponentwiseAffine((2,))], (2,))
        >>> x, log_q = flow.as_distribution().rsample_and_log_prob((64,))
        >>> (log_q - target.log_prob(x).sum(-1)).mean().backward()
        >>> flow.bijections[0].shift.grad.sign()  # downhill: x = z - shift moves towards the target
        tensor([ 1., -1.])
        """
        self._check_rsample()
        noise, context, shape = self._noise(sample_shape)
        if not self.exact:
            x = self.flow.inverse(noise, context).reshape(shape)
            return x, self.log_prob(x)
        x, log_det = self._undone(noise, context)
        log_prob = ops.normal_log_prob(noise) + log_det
        return x.reshape(shape), log_prob.reshape(shape[: len(shape) - len(self.event_shape)])

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log-density of ``value`` ``(*, *event_shape)`` in nats, ``(*)``."""
        lead = leading(value.shape, self.event_shape, "value")
        if self._validate_args and value.numel():  # torch's check takes no empty batch
            self._validate_sample(value)
        seen = torch.broadcast_shapes(lead, self.batch_shape if self.context is not None else ())
        prepare(_parts(self.flow), self.flow.event_shape)
        log_prob = self.flow.log_prob(
            flattened(value, seen, len(self.event_shape)), flattened(self.context, seen, 1)
        )
        return log_prob.reshape(seen).expand(torch.broadcast_shapes(seen, self.batch_shape))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, exact={self.exact})"
        )

    def _noise(self, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Noise ``(B, *latent_shape)``, the context that goes with it, and the samples' shape."""
        shape = self._extended_shape(torch.Size(sample_shape))
        lead = shape[: len(shape) - len(self.event_shape)]
        like = next(self.flow.parameters(), torch.empty(0))
        noise = torch.randn(
            math.prod(lead), *self.flow.latent_shape, dtype=like.dtype, device=like.device
        )
        return noise, flattened(self.context, lead, 1), shape

    def _undone(self, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x of the noise and ``log |det dz/dx|``, with gradients."""
        parts = _parts(self.flow)
        prepare(parts, self.flow.event_shape, backwards=True)
        return exact_inverse(parts, noise, context)

    def _check_rsample(self) -> None:
        if not self.has_rsample:
            raise NotImplementedError(
                "rsample must have real numbers to differentiate; this flow gives integers, as it "
                "dequantizes: sample() draws them"
            )


def _parts(flow: Flow) -> list[Bijection]:
    return list(flow.bijections)  # type: ignore[arg-type]
