"""Composition of bijections into a density."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import func_transforms, ops, reversible
from .bijection import Bijection, FlowStep, per_sample_sum, pull, push, walk, wide_dtype
from .exact import Plan
from .refine import checked_refine
from .reversible import Reversible

if TYPE_CHECKING:
    from .distributions import FlowDistribution


class Flow(nn.Module):
    """A density on events, as bijections from data to a standard normal base.

    ``log p(x) = log N(z; 0, I) + sum of log |det|``, z the data pushed through all bijections.

    Args:
        bijections: from data to noise, in this order.
        event_shape: shape of one sample of data.
        recon_weight: lambda, the weight of the reconstruction penalty in :meth:`loss`.
        context_features: K, the size of the context ``(B, K)`` that a conditional flow takes; 0
            for a flow that takes none.

    Attributes:
        reversible: None, or a :class:`Reversible`: passes that record gradients then keep no
            activations, and backward rebuilds them.

    Raises:
        ValueError: ``recon_weight`` is negative or not finite, ``context_features`` negative.

    Source: SNF equations 2-3 and 6.

    >>> import snf_ext
    >>> flow = snf_ext.Flow(
    ...     [snf_ext.SelfNormLinear(8), snf_ext.SmoothLeakyReLU(0.3), snf_ext.SelfNormLinear(8)],
    ...     event_shape=(8,),
    ... )
    >>> x = torch.randn(16, 8)
    >>> flow.loss(x).backward()
    >>> flow.log_prob(x).shape, flow.sample(4).shape
    (torch.Size([16]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        bijections: Iterable[Bijection],
        event_shape: tuple[int, ...],
        recon_weight: float = 1.0,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        if context_features < 0:
            raise ValueError(f"context_features must not be negative; got {context_features}")
        if not (recon_weight >= 0 and math.isfinite(recon_weight)):
            raise ValueError(f"recon_weight must be finite and not negative; got {recon_weight}")
        self.bijections = nn.ModuleList(bijections)
        self.event_shape = tuple(event_shape)
        self.recon_weight = recon_weight
        self.context_features = context_features
        self._reversible: Reversible | None = None
        latent_shape = self.event_shape
        for bijection in self._steps():
            latent_shape = tuple(bijection.output_shape(latent_shape))
        self.latent_shape = latent_shape

    @property
    def reversible(self) -> Reversible | None:
        """How activations are rebuilt in backward; None if they are kept."""
        return self._reversible

    @reversible.setter
    def reversible(self, how: Reversible | None) -> None:
        if how is not None and not isinstance(how, Reversible):
            raise TypeError(f"reversible must be None or a Reversible; got {how!r}")
        self._reversible = how

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """Push ``x`` ``(B, *event_shape)`` to noise; ``log_det`` and ``recon`` are summed, (B,).

        In training mode ``log_det`` is a surrogate (see :class:`FlowStep`).
        """
        return self._push(x, context, exact=False)

    def loss(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        log_det_penalty: float = 0.0,
        bits_per_dim: bool = False,
    ) -> Tensor:
        """The training objective, a scalar: ``mean(-log N(z) - log_det) + lambda mean(recon)``.

        In training mode its value is no likelihood, because that of ``log_det`` is 0; its
        gradient is the self-normalizing one. Use :meth:`log_prob` for the likelihood.

        Args:
            x: raw data ``(B, *event_shape)``.
            context: ``(B, context_features)`` for a conditional flow.
            log_det_penalty: weight of ``sum of log_det^2`` over the mixing layers (linear maps of
                all channels or features), which keeps them near volume-preserving; O(D^3) for
                layers whose determinant training otherwise avoids. SFM 4.1 takes 1e-5 or 1e-3
                with ``bits_per_dim``.
            bits_per_dim: divide the objective, but not the penalty, by ``D ln 2``.

        Raises:
            ValueError: x has the wrong shape, no sample, or (on the CPU) values that are not
                finite; the context does not fit; the penalty is negative or not finite.

        Source: SNF 6; SFM 4.1, equation 2.
        """
        self._check_event(x, "x")
        self._check_context(context, x.shape[0])
        if x.shape[0] == 0:
            raise ValueError(f"x must hold at least one sample; got {list(x.shape)}")
        if not 0 <= log_det_penalty < math.inf:
            raise ValueError(
                f"log_det_penalty must be finite and not negative; got {log_det_penalty}"
            )
        z, log_det, recon = self(x, context)
        loss = -(ops.normal_log_prob(z) + log_det).mean() + self.recon_weight * recon.mean()
        if bits_per_dim:
            loss = loss / (math.prod(self.event_shape) * math.log(2))
        _refuse_non_finite_input(x, loss)
        if log_det_penalty > 0:
            loss = loss + log_det_penalty * self.squared_log_dets()
        return loss

    def squared_log_dets(self) -> Tensor:
        """Sum over the mixing layers of the square of their exact log-determinant, a scalar.

        In nats squared; its gradient is exact, or the learned inverse's. Cost: as in :meth:`loss`.
        """
        like = next(self.parameters(), torch.empty(0))
        total = torch.zeros((), dtype=wide_dtype(like.dtype), device=like.device)
        for bijection, shape in walk(self._steps(), self.event_shape):
            if bijection.mixing:  # the same for every sample, so that one will do
                sample = torch.zeros((1, *shape), dtype=like.dtype, device=like.device)
                log_det = per_sample_sum(bijection.exact_forward(sample).log_det)
                total = total + log_det.square().sum()
        return total

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Exact ``log p(x)`` in nats, ``(B,)``, in training mode too.

        Determinants that do not depend on the data are computed once and kept until a weight
        changes. Gradients with respect to the weights of self-normalizing layers are the learned
        inverse's.

        Raises:
            ValueError: x has the wrong shape, or (on the CPU) values that are not finite; the
                context does not fit.
        """
        self._check_event(x, "x")
        self._check_context(context, x.shape[0])
        z, log_det, _ = self._push(x, context, exact=True)
        log_prob = ops.normal_log_prob(z) + log_det
        _refuse_non_finite_input(x, log_prob)
        return log_prob

    def inverse(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        """Pull noise ``(B, *latent_shape)`` back to data, by the learned or the true inverses.

        With ``refine=n`` each learned inverse, at any depth, is improved by at most n steps of
        ``x <- x + R (y - W x)``, of one pass forward and one back: float precision where it has
        been learned well, and :class:`snf_ext.InverseNotConverged` where that makes it worse.

        Raises:
            ValueError: ``refine`` is no int of at least 0, or goes with ``exact``.
        """
        return pull(self._steps(), z, context, exact, checked_refine(refine, exact))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        context: Tensor | None = None,
        exact: bool = False,
        temperature: float = 1.0,
        refine: int = 0,
    ) -> Tensor:
        """``count`` samples, ``(count, *event_shape)``.

        Args:
            count: how many.
            context: for a conditional flow ``(count, context_features)``, or
                ``(context_features,)`` for all samples alike.
            exact: pull back by the true inverses instead of the learned ones.
            temperature: standard deviation of the noise, at every scale of the flow.
            refine: the most steps to improve each learned inverse by, as in :meth:`inverse`.

        Raises:
            ValueError: ``count`` is negative, ``temperature`` not positive, the context does
                not fit, or ``refine`` is no int of at least 0 or goes with ``exact``.
        """
        if count < 0:
            raise ValueError(f"count must not be negative; got {count}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        if context is not None and context.dim() == 1:
            context = context.expand(count, -1)
        self._check_context(context, count)
        like = next(self.parameters(), torch.empty(0))
        noise = torch.randn(count, *self.latent_shape, dtype=like.dtype, device=like.device)
        return self.inverse(noise * temperature, context, exact=exact, refine=refine)

    def as_distribution(
        self, context: Tensor | None = None, exact: bool = True
    ) -> FlowDistribution:
        """This density as a ``torch.distributions.Distribution``; a context gives it a batch shape.

        >>> import snf_ext
        >>> flow = snf_ext.Flow([snf_ext.SelfNormLinear(4)], event_shape=(4,))
        >>> q = flow.as_distribution()
        >>> q.log_prob(q.sample((7,))).shape
        torch.Size([7])
        """
        from .distributions import FlowDistribution  # of a floor above, as the layers' domains are

        return FlowDistribution(self, context, exact)

    def fit_inverses(self, tracked_alone: bool = False) -> None:
        """Set every learned inverse, at any depth, to what undoes its weight best.

        The inverse of a linear layer, the least-squares kernel of a convolution: see their
        ``fit_inverse``. A tracked inverse may be some steps behind its weight until then.

        Args:
            tracked_alone: leave alone the inverses that are parameters.

        Raises:
            ValueError: a linear layer is singular.

        >>> import snf_ext
        >>> flow = snf_ext.Flow([snf_ext.SelfNormLinear(4)], event_shape=(4,))
        >>> flow.fit_inverses()
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(flow.inverse(flow(x).z), x, atol=1e-5)
        True
        """
        for part, shape in walk(self._steps(), self.event_shape):
            learns = getattr(part, "weight_inv", None)
            if learns is not None and not (tracked_alone and learns.requires_grad):
                part.fit_inverse(shape[1:])  # type: ignore[operator]

    def exact_plans(self) -> dict[str, Plan]:
        """What the exact values of each convolution take, in operations and memory, by name.

        For every layer that has an ``exact_plan``, at any depth, in the order of the data.
        Nothing is computed.

        >>> import snf_ext
        >>> flow = snf_ext.Flow([snf_ext.SelfNormConv2d(3, 3)], event_shape=(3, 64, 64))
        >>> for name, plan in flow.exact_plans().items():
        ...     print(f"{name}: {plan.parts}")
        bijections.0: 64 blocks of 192 rows
        """
        names = {module: name for name, module in self.named_modules()}
        return {
            names[part]: part.exact_plan((shape[-2], shape[-1]))  # type: ignore[operator]
            for part, shape in walk(self._steps(), self.event_shape)
            if hasattr(part, "exact_plan")
        }

    def _steps(self) -> list[Bijection]:
        return list(self.bijections)  # type: ignore[arg-type]

    def _push(self, x: Tensor, context: Tensor | None, exact: bool) -> FlowStep:
        if self._reversible is None or not torch.is_grad_enabled() or func_transforms.active():
            return push(self._steps(), x, context, exact)
        return reversible.push(self._reversible, self, self._steps(), x, context, exact)

    def _check_event(self, x: Tensor, name: str) -> None:
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"{name} must have shape [B, ...] with events {list(self.event_shape)}; "
                f"got {list(x.shape)}"
            )

    def _check_context(self, context: Tensor | None, batch: int) -> None:
        features = self.context_features
        if features and (context is None or list(context.shape) != [batch, features]):
            raise ValueError(
                f"context must have shape [B, K] = [{batch}, {features}]; got {_got(context)}"
            )
        if not features and context is not None:
            raise ValueError(
                f"context must not be given to a flow whose context_features are 0; "
                f"got {_got(context)}"
            )

    def extra_repr(self) -> str:
        text = f"event_shape={self.event_shape}, recon_weight={self.recon_weight}"
        return text + f", context_features={self.context_features}" * bool(self.context_features)


def _got(context: Tensor | None) -> str:
    return "none" if context is None else str(list(context.shape))


def _refuse_non_finite_input(x: Tensor, result: Tensor) -> None:
    """Name NaN or inf in the data as the cause. Elsewhere than on the CPU it would synchronise."""
    if torch.compiler.is_compiling() or func_transforms.active() or result.device.type != "cpu":
        return
    if not torch.isfinite(result.detach()).all() and not torch.isfinite(x.detach()).all():
        bad = int((~torch.isfinite(x.detach()).flatten(1).all(1)).sum())
        raise ValueError(f"x must be finite; got NaN or inf in {bad} of {x.shape[0]} samples")
