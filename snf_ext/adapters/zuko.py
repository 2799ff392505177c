"""zuko's transforms as bijections, and bijections as zuko's transforms.

zuko calls the direction from data to noise a transform's call, as ``forward`` here. It is imported
only by what needs it: its import changes torch.distributions for the whole process (no argument
is checked any more, and every transform gets a method ``call_and_ladj``).

Self-normalizing layers inside a zuko flow::

    import zuko
    from snf_ext.adapters import as_lazy_transform, pop_recon

    nsf = zuko.flows.NSF(8)
    linear = as_lazy_transform(snf_ext.SelfNormLinear(8), (8,))
    flow = zuko.lazy.Flow([linear, nsf.transform], nsf.base)
    loss = -flow().log_prob(x).mean() + 10.0 * pop_recon(flow).mean()
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from ..training.errors import require
from ..transforms import BijectionTransform
from .inversion import invert


def import_zuko() -> ModuleType:
    """The package zuko.

    Raises:
        UserError: it is not installed; the message has the command that installs it.
    """
    return require("zuko", "zuko")


class ZukoBijection(Bijection):
    """``z = f(x | context)`` for a lazy transform f of zuko, or the transform of a zuko flow.

    Shapes: x ``(B, D)``, context ``(B, C)``, z ``(B, D)``, ``log_det`` ``(B,)`` in nats, float32
    or wider. A zuko flow's base is left out: the base here is standard normal, as that of all its
    flows but NCSF and GMM. Both inverses are f's own. Those of NAF, UNAF, SOSPF, BPF and GF are
    found by bisection to 5e-7, and only within [-10, 10] (BPF: within its bound, and exact
    outside); that of CNF by an ODE solver to its tolerance. In float32 the tails of GF, whose
    distribution functions saturate, come back to 1e-3. The inverse of an autoregressive f takes D
    passes, of one element each. Not under ``torch.inference_mode``, as zuko differentiates for
    the log-determinant of some of them.

    Args:
        lazy: a ``zuko.lazy.LazyTransform`` or a ``zuko.lazy.Flow``.
        features: D.
        context_features: C; 0 for a transform without context, which then ignores any context.

    Raises:
        TypeError: ``lazy`` is neither of them.
        ValueError: x or context of another shape, or no context where one is needed.

    Source: Rozet et al., zuko (https://zuko.readthedocs.io).

    >>> import zuko
    >>> f = ZukoBijection(zuko.flows.NSF(3, context=2), features=3, context_features=2)
    >>> z, log_det, _ = f(torch.randn(5, 3), torch.randn(5, 2))
    >>> z.shape, log_det.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """

    undoes = False  # not all to float precision, and most one element a pass

    def __init__(self, lazy: nn.Module, features: int, context_features: int = 0) -> None:
        super().__init__()
        zuko = import_zuko()
        transform = lazy.transform if isinstance(lazy, zuko.lazy.Flow) else lazy
        if not isinstance(transform, zuko.lazy.LazyTransform):
            raise TypeError(
                "lazy must be a zuko.lazy.LazyTransform or a zuko.lazy.Flow; "
                f"got {type(lazy).__name__}"
            )
        self.lazy: nn.Module = transform
        self.features, self.context_features = features, context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        context = self._check(x, "x", context)
        zeros = per_sample_zeros(x)
        if x.shape[0] == 0:  # solvers look for the largest error
            return FlowStep(x, zeros, zeros)
        z, log_det = self.lazy(context).call_and_ladj(x)
        return FlowStep(z, log_det.to(wide_dtype(x.dtype)), zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        context = self._check(z, "z", context)
        return invert(import_zuko(), self.lazy, z, context) if z.shape[0] else z

    def _check(self, x: Tensor, name: str, context: Tensor | None) -> Tensor | None:
        """The context that the transform takes."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(
                f"{name} must have shape [B, D] with D = {self.features}; got {list(x.shape)}"
            )
        if not self.context_features:
            return None
        want = [x.shape[0], self.context_features]
        if context is None or list(context.shape) != want:
            got = None if context is None else list(context.shape)
            raise ValueError(f"context must have shape [B, C] = {want}; got {got}")
        return context

    def extra_repr(self) -> str:
        return f"features={self.features}, context_features={self.context_features}"


class _LazyTransform(BijectionTransform):
    """What a :class:`LazyBijection` gives; steps are its own, as it keeps their ``recon``."""

    def __init__(self, owner: LazyBijection, context: Tensor | None) -> None:
        super().__init__(owner.bijection, owner.event_shape, context, exact=owner.exact)
        self.owner = owner

    def _step(self, x: Tensor, context: Tensor | None) -> FlowStep:
        step = super()._step if self.exact else self.owner.bijection
        return self.owner.keep(step(x, context))


class LazyBijection(nn.Module):
    """The module that :func:`as_lazy_transform` gives; called, it gives the transform."""

    def __init__(self, bijection: Bijection, event_shape: tuple[int, ...], exact: bool) -> None:
        super().__init__()
        self.bijection = bijection
        self.event_shape = tuple(event_shape)
        self.latent_shape = tuple(bijection.output_shape(self.event_shape))
        self.exact = exact
        self.recon: Tensor | None = None

    def forward(self, c: Tensor | None = None) -> BijectionTransform:
        return _LazyTransform(self, c)

    def keep(self, step: FlowStep) -> FlowStep:
        """``step``, whose ``recon`` is kept in training mode."""
        self.recon = step.recon if self.training and torch.is_grad_enabled() else None
        return step

    @property
    def inv(self) -> nn.Module:
        """The lazy transform from noise to data."""
        inverse: nn.Module = import_zuko().lazy.LazyInverse(self)
        return inverse

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"recon": None}  # a part of a graph can be neither copied nor saved

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, exact={self.exact}"


def as_lazy_transform(
    bijection: Bijection, event_shape: tuple[int, ...], exact: bool = False
) -> LazyBijection:
    """A bijection as a ``zuko.lazy.LazyTransform``, to be composed with zuko's in its ``Flow``.

    In training mode the self-normalizing layers' ``log_det`` has value 0 and the learned
    inverse's gradient: ``flow().log_prob(x)`` then has the right gradient, but its value is no
    likelihood. In evaluation mode it is exact. The reconstruction penalty, without which the
    learned inverse drifts, has no place in zuko's flows: add :func:`pop_recon` to the loss.

    Args:
        bijection: of this package, or of yours.
        event_shape: of one input, ``(D,)`` for vectors.
        exact: the exact value of ``log_det`` in training mode too, O(D³) a step, and the true
            inverse in place of the learned one, as :class:`snf_ext.BijectionTransform`.

    Raises:
        UserError: zuko is not installed.

    >>> import snf_ext, zuko
    >>> theirs = zuko.flows.MAF(4, transforms=1)
    >>> layer = as_lazy_transform(snf_ext.SelfNormLinear(4), (4,))
    >>> flow = zuko.lazy.Flow([layer, theirs.transform], theirs.base)
    >>> loss = -flow().log_prob(torch.randn(16, 4)).mean() + 10.0 * pop_recon(flow).mean()
    >>> loss.backward()
    >>> flow.eval()().sample((5,)).shape
    torch.Size([5, 4])
    """
    # Registered rather than derived, so that this module can be imported without zuko.
    import_zuko().lazy.LazyTransform.register(LazyBijection)
    return LazyBijection(bijection, event_shape, exact)


def pop_recon(flow: nn.Module) -> Tensor:
    """The reconstruction errors of the last training evaluation, ``(B,)``, summed over its layers.

    To be called after ``log_prob``, once: it lets go of them.

    Raises:
        ValueError: there are none.
    """
    errors = []
    for module in flow.modules():
        if isinstance(module, LazyBijection) and module.recon is not None:
            errors.append(module.recon)
            module.recon = None
    if not errors:
        raise ValueError(
            "flow must hold a layer from as_lazy_transform and have been evaluated in training "
            "mode since the last pop_recon; got no reconstruction error"
        )
    return torch.stack(errors).sum(0)
