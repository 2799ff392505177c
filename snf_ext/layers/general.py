"""Any two networks as a bijection: one maps to noise, the other learns to be its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..bijection import FlowStep, per_sample_sum, wide_dtype
from ..constraint import weighted
from ..controllers import Controller
from ..jacobian import EventMap, jacobian, orthonormal_probes, pulled, pushed
from ..newton import newton_inverse
from ..reference.autocast import widened_under_autocast, without_autocast
from ..refine import Refined, checked_refine, checked_steps, refined
from .event import check_events, checked_event_shape, checked_size
from .gradients import halved, mirrored
from .refining import Refining


class SelfNormBijection(Refining):
    """``z = f(x)`` for any network f, with a second network g that learns its inverse.

    The linear layer's method without the linear layer. In training the value of ``log_det`` is 0.
    With ``d = dL/dz``, ``c = dL/dlog_det`` and ``q = dL/drecon`` of a sample, J_f and J_g the
    Jacobians at x and at z, and [.] held fixed, the gradients are, summed over the batch,

        dx     = J_f'd + c grad_x tr([J_g] J_f)                            whole, to what is before
        dtheta = 1/2 grad_theta (d'f(x) + c tr([J_g] J_f)) + q grad_theta recon        (SNF 4)
        dgamma = -1/2 grad_gamma (dx'g([z]) + c tr([J_f] J_g)) + q grad_gamma recon    (SNF 5)
        recon  = ||g(f(x)) - x||^2, which sends no gradient to x                       (SNF 3)

    for the parameters theta of f and gamma of g. Where g is the inverse of f, these are half the
    exact gradients of the log-densities that f and g define. In dgamma, dx is the *whole*
    gradient that the layer sends back: what ``log |det J_g|`` owes to ``z = g^-1(x)`` moving with
    gamma is just what ``log |det J_f|`` sends to x. For linear f and g all this is
    :class:`SelfNormLinear`, but that a bias, which there f and g share, gets half here.

    Traces are estimated by random directions v, orthogonal and of length sqrt(D), each sample its
    own: ``tr(J_g J_f) = E[(J_g'v)'(J_f v)]`` (:func:`snf_ext.jacobian.orthonormal_probes`).
    Exact with ``probes`` = D.

    Evaluation mode, :meth:`exact_forward` and so ``Flow.log_prob`` have the exact
    ``log |det J_f(x)|``, by the whole Jacobian, and its exact, whole gradient: theirs is the
    density of f alone, and g only gets what recon sends.

    **f must be a bijection for this to be a density.** Nothing here makes it one: where f folds
    space, ``log_prob`` is that of no distribution. Invertible by construction, or held to it by
    ``recon``, and to be checked where it matters (in two dimensions, integrate it).

    Shapes: x ``(B, *event_shape)``, z the same, ``log_det`` and ``recon`` ``(B,)``.

    Args:
        f: maps a batch of events to one of the same shape, each event on its own, with the same
            result each time: no dropout, no batch norm. Its operations need forward-mode
            derivatives, as torch's have, and derivatives of these.
        g: the same for the way back, with derivatives of backward-mode derivatives. Where f and g
            share parameters, these get both gradients.
        event_shape: shape of one event, of D elements.
        probes: P, random directions for each sample, 1..D.
        jvp_weight: weight w of the constraint on Jacobians: in training recon is
            ``||g(f(x)) - x||^2 + w mean over v of ||J_g J_f v - v||^2``, whose expectation is
            ``w ||J_g J_f - I||_F^2``. That g leads back from f(x) to x says nothing about their
            slopes there, which the gradients above take to be inverse; this does.

    Raises:
        TypeError: f or g is no module.
        ValueError: ``event_shape`` has no positive sizes, ``probes`` is out of range,
            ``jvp_weight`` is negative or not finite; x does not fit; f or g changes the shape.

    Under autocast f and g run in float32: what rounding adds to g(f(x)) would be in recon.

    Cost: a training step takes 2 + P passes through each of f and g, and their gradients; with
    ``jvp_weight`` P more. Exact values take D passes through f and O(D^3) for each sample.
    Source: SNF 3.2, equations 3-5; 31 for ``jvp_weight``, where v is uniform in the unit cube and
    the choice is left open.

    >>> from torch import nn
    >>> def network():
    ...     return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> layer = SelfNormBijection(network(), network(), (2,), probes=2)
    >>> x = torch.randn(7, 2)
    >>> z, log_det, recon = layer(x)
    >>> z.shape, log_det.tolist() == [0.0] * 7
    (torch.Size([7, 2]), True)
    >>> J = torch.autograd.functional.jacobian(layer.f, x[0])
    >>> torch.allclose(layer.eval()(x).log_det[0], J.det().abs().log(), atol=1e-5)
    True
    """

    controller: Controller | None

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        event_shape: tuple[int, ...],
        probes: int = 1,
        jvp_weight: float = 0.0,
    ) -> None:
        super().__init__()
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module; got {type(module).__name__}")
        self.event_shape = checked_event_shape(event_shape)
        size = math.prod(self.event_shape)
        if checked_size("probes", probes) > size:
            raise ValueError(f"probes must be at most D = {size}; got {probes}")
        if not (jvp_weight >= 0 and math.isfinite(jvp_weight)):
            raise ValueError(f"jvp_weight must be finite and not negative; got {jvp_weight}")
        self.f, self.g = f, g
        self.probes, self.jvp_weight = probes, jvp_weight
        self.controller = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        """``z = f(x)``; ``log_det`` a surrogate in training mode, else exact."""
        if not self.training:
            return self.exact_forward(x)
        (x,) = widened_under_autocast(x)
        with without_autocast(x.device):
            step = self._surrogate_forward(x)
        return weighted(step, self.controller, x)

    def exact_forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_events(x, "x", self.event_shape)
        (x,) = widened_under_autocast(x)
        f, g = _applied("f", self.f), _applied("g", self.g)
        with without_autocast(x.device):
            slope = jacobian(self._wide_f(x), x.to(wide_dtype(x.dtype)))
            recon = _squared(g(f(x.detach())), x.detach())
            return FlowStep(f(x), torch.linalg.slogdet(slope).logabsdet, recon)

    def _surrogate_forward(self, x: Tensor) -> FlowStep:
        check_events(x, "x", self.event_shape)
        v = orthonormal_probes(x, self.probes)
        z_fixed, recon = self._constraint(x.detach(), v)
        back, pulled_v = pulled(_applied("g", self.g, halved), z_fixed, v)
        z, pushed_v = pushed(_applied("f", self.f, halved), mirrored(x, back), v)
        trace = _dot(pulled_v.detach(), pushed_v) - _dot(pulled_v, pushed_v.detach())
        return FlowStep(z, trace - trace.detach(), recon)

    def _constraint(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` without gradient, and recon."""
        f, g = _applied("f", self.f), _applied("g", self.g)
        if not self.jvp_weight:
            z = f(x)
            return z.detach(), _squared(g(z), x)
        z, there = pushed(f, x, v)
        back, there_and_back = pushed(g, z, there)
        jacobians = torch.stack(
            [_squared(w, start) for w, start in zip(there_and_back, v, strict=True)]
        )
        return z.detach(), _squared(back, x) + self.jvp_weight * jacobians.mean(0)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        """``g(z)``, or with ``exact=True`` the solution of ``f(x) = z``.

        The latter by Newton's method from ``g(z)``, in at least float32; see
        :func:`snf_ext.newton.newton_inverse`. With ``refine=n`` the former, improved by at most n
        steps of :meth:`refine_inverse`.

        Raises:
            ValueError: z has the wrong shape, ``exact`` and the method does not converge,
                ``refine`` is no int of at least 0 or goes with ``exact``.

        Warns:
            InverseNotConverged: refining makes the residual of a sample grow; its best iterate
                is given.
        """
        check_events(z, "z", self.event_shape)
        if checked_refine(refine, exact):
            return self._refined(z, refine, f"{type(self).__name__}({self.extra_repr()})").x.to(
                z.dtype
            )
        (z,) = widened_under_autocast(z)
        wide = wide_dtype(z.dtype)
        with without_autocast(z.device):
            start = _applied("g", self.g)(z)
            if not exact:
                return start
            x = newton_inverse(self._wide_f(z), z.to(wide), start.detach().to(wide))
        return x.to(z.dtype)

    def refine_inverse(self, z: Tensor, steps: int) -> Refined:
        """The learned inverse, improved by at most ``steps`` steps, with what is left to improve.

            x <- g(z),  then  x <- x + g(z) - g(f(x))

        It takes no Jacobian and no solution, and reaches float precision where the spectral radius
        of ``I - J_g J_f`` is under 1. Returns the best iterate of each sample, its relative
        residual ``||g(z) - g(f(x))|| / ||g(z)||`` and how many steps were taken. Cost: a pass
        through f and one through g a step. Details: :func:`snf_ext.refine.refined`.

        Raises:
            ValueError: z has the wrong shape, or ``steps`` is no int of at least 0.
        """
        check_events(z, "z", self.event_shape)
        return self._refined(z, checked_steps(steps, "steps"))

    def _refined(
        self, z: Tensor, steps: int, layer: str | None = None, wait: bool = True
    ) -> Refined:
        # W of the linear iteration is g o f, and its R the identity.
        wide = wide_dtype(z.dtype)
        f, g = self._wide_f(z), _applied("g", self.g, partial(_widened, wide))
        aim = g(z.to(wide))
        dims = len(self.event_shape)
        return refined(aim, lambda x: g(f(x)), lambda r: r, steps, dims, layer, wait)

    def _wide_f(self, x: Tensor) -> EventMap:
        """f in the precision of log-determinants."""
        return _applied("f", self.f, partial(_widened, wide_dtype(x.dtype)))

    def extra_repr(self) -> str:
        return f"{self.event_shape}, probes={self.probes}, jvp_weight={self.jvp_weight}"


def _applied(
    name: str, module: nn.Module, change: Callable[[Tensor], Tensor] = lambda p: p
) -> EventMap:
    """``module`` as a function of events alone, its parameters and buffers changed."""
    tensors = {
        key: change(value)
        for named in (module.named_parameters, module.named_buffers)
        for key, value in named()
    }

    def function(x: Tensor) -> Tensor:
        y = functional_call(module, tensors, (x,))
        if y.shape != x.shape:
            raise ValueError(
                f"{name} must keep the shape of its input, {list(x.shape)}; got {list(y.shape)}"
            )
        return y.to(x.dtype)

    return function


def _widened(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """``||x - y||^2`` of each event."""
    wide = wide_dtype(x.dtype)
    return per_sample_sum((x.to(wide) - y.to(wide)).square())


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """``u'v`` of each event, its mean over the directions in front."""
    wide = wide_dtype(u.dtype)
    return (u.to(wide) * v.to(wide)).flatten(2).sum(2).mean(0)
