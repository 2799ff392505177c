"""Composition of bijections into a density."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .bijection import Bijection, FlowStep, pull, push, wide_dtype


class Flow(nn.Module):
    """A density on events, as bijections from data to a standard normal base.

    ``log p(x) = log N(z; 0, I) + sum of log |det|``, z the data pushed through all bijections.

    Args:
        bijections: from data to noise, in this order.
        event_shape: shape of one sample of data.
        recon_weight: lambda, the weight of the reconstruction penalty in :meth:`loss`.

    Raises:
        ValueError: ``recon_weight`` is negative or not finite.

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
    ) -> None:
        super().__init__()
        if not (recon_weight >= 0 and math.isfinite(recon_weight)):
            raise ValueError(f"recon_weight must be finite and not negative; got {recon_weight}")
        self.bijections = nn.ModuleList(bijections)
        self.event_shape = tuple(event_shape)
        self.recon_weight = recon_weight
        latent_shape = self.event_shape
        for bijection in self._steps():
            latent_shape = tuple(bijection.output_shape(latent_shape))
        self.latent_shape = latent_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """Push ``x`` ``(B, *event_shape)`` to noise; ``log_det`` and ``recon`` are summed, (B,).

        In training mode ``log_det`` is a surrogate (see :class:`FlowStep`).
        """
        return self._push(x, context, exact=False)

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The training objective, a scalar: ``mean(-log N(z) - log_det) + lambda mean(recon)``.

        In training mode its value is no likelihood, because that of ``log_det`` is 0; its
        gradient is the self-normalizing one. Use :meth:`log_prob` for the likelihood.

        Raises:
            ValueError: x has the wrong shape, no sample, or (on the CPU) values that are not
                finite.
        """
        self._check_event(x, "x")
        if x.shape[0] == 0:
            raise ValueError(f"x must hold at least one sample; got {list(x.shape)}")
        z, log_det, recon = self(x, context)
        loss = -(standard_normal_log_prob(z) + log_det).mean() + self.recon_weight * recon.mean()
        _refuse_non_finite_input(x, loss)
        return loss

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Exact ``log p(x)`` in nats, ``(B,)``, in training mode too.

        Determinants that do not depend on the data are computed once and kept until a weight
        changes. Gradients with respect to the weights of self-normalizing layers are the learned
        inverse's.

        Raises:
            ValueError: x has the wrong shape, or (on the CPU) values that are not finite.
        """
        self._check_event(x, "x")
        z, log_det, _ = self._push(x, context, exact=True)
        log_prob = standard_normal_log_prob(z) + log_det
        _refuse_non_finite_input(x, log_prob)
        return log_prob

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """Pull noise ``(B, *latent_shape)`` back to data, by the learned or the true inverses."""
        return pull(self._steps(), z, context, exact)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        context: Tensor | None = None,
        exact: bool = False,
        temperature: float = 1.0,
    ) -> Tensor:
        """``count`` samples, ``(count, *event_shape)``.

        Args:
            count: how many.
            context: passed to every bijection.
            exact: pull back by the true inverses instead of the learned ones.
            temperature: standard deviation of the noise.

        Raises:
            ValueError: ``count`` is negative or ``temperature`` not positive.
        """
        if count < 0:
            raise ValueError(f"count must not be negative; got {count}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        like = next(self.parameters(), torch.empty(0))
        noise = torch.randn(count, *self.latent_shape, dtype=like.dtype, device=like.device)
        return self.inverse(noise * temperature, context, exact=exact)

    def _steps(self) -> list[Bijection]:
        return list(self.bijections)  # type: ignore[arg-type]

    def _push(self, x: Tensor, context: Tensor | None, exact: bool) -> FlowStep:
        return push(self._steps(), x, context, exact)

    def _check_event(self, x: Tensor, name: str) -> None:
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"{name} must have shape [B, ...] with events {list(self.event_shape)}; "
                f"got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, recon_weight={self.recon_weight}"


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """``log N(z; 0, I)`` in nats of each sample, ``(B, ...) -> (B,)``, float32 or wider."""
    flat = z.flatten(1).to(wide_dtype(z.dtype))
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


def _refuse_non_finite_input(x: Tensor, result: Tensor) -> None:
    """Name NaN or inf in the data as the cause. Elsewhere than on the CPU it would synchronise."""
    if torch.compiler.is_compiling() or result.device.type != "cpu":
        return
    if not torch.isfinite(result.detach()).all() and not torch.isfinite(x.detach()).all():
        bad = int((~torch.isfinite(x.detach()).flatten(1).all(1)).sum())
        raise ValueError(f"x must be finite; got NaN or inf in {bad} of {x.shape[0]} samples")
