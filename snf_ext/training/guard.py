"""Training that has gone astray is stopped, and told where and why."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..bijection import Bijection, FlowStep, wide_dtype
from ..flow import Flow
from ..jacobian import EventMap, pushed
from ..layers import SelfNormBijection, SelfNormConv2d, SelfNormLinear
from .errors import Diverged
from .seeds import derive_seed

Learned: TypeAlias = SelfNormLinear | SelfNormConv2d | SelfNormBijection

# Of a norm only "far past 1" is asked. From any start the steps bound it from below, so that they
# never cry wolf, and one that stands out by far is found within these.
POWER_STEPS = 4
# Events at which the Jacobians of a general bijection are looked at.
EVENTS = 8

ADVICE = {
    "input": "look at the data",
    "loss": "try a lower --lr, a larger --recon-weight where there is a penalty, --clip-norm, or a "
    "longer --warmup-epochs",
    "gradient": "try a lower --lr, --clip-norm, or a longer --warmup-epochs",
    "rebuilt": "train without --reversible, or let the learned inverse be tracked "
    "(inverse=tracked), which is closer to the true one",
    "reconstruction": "the learned inverse does not keep up with its layer: let it be tracked "
    "(inverse=tracked), or try a larger --recon-weight, a lower --lr, or a longer --warmup-epochs",
    "inverse": "samples by the learned inverse are of no use: try a larger --recon-weight, or draw "
    "them by the exact (exact=True) or a refined inverse (refine=n) and leave out --check-inverse",
}


class DivergenceGuard:
    """Stops training at the first step that it cannot come back from, with the layer's name.

    What is looked at, and what is too much:

        loss             not finite                                           every step
        reconstruction   E||x - R W x||^2 / E||x||^2 of a layer over 10       every so many steps
        gradient         not finite                                           every so many steps
        inverse          ||I - R W|| of a layer over 10, if it is asked for   every so many steps

    R = 0 has a relative reconstruction error of 1, and the models of the paper stay under 0.1: an
    inverse ten times worse than none is of no use to the gradient. A layer that starts worse (two
    networks that know nothing of each other) may be ten times as bad as at the first step. For a
    general bijection these are ``g(f(x))`` and ``J_g J_f``. The norm is a lower bound, by power
    iteration; over 1, there are samples that the learned inverse leaves further from the true ones
    than zero is.

    Training stays what it is, to the bit: no random number is drawn, and what is decided depends on
    the step's number, its batch, the weights and ``start`` alone.

    Args:
        flow: the flow that is trained.
        every: steps from one check to the next, besides the first step; 0 leaves the loss alone.
        check_inverse: look at ``||I - R W||``: where samples by the learned inverse are the aim. A
            general bijection's g, too, must then have forward-mode derivatives.
        recon_limit: the largest relative reconstruction error.
        inverse_limit: the largest norm.

    Attributes:
        steps: how many steps were begun. Set it where training goes on from a checkpoint.
        start: relative reconstruction errors of the first step, of layers where it was over 1. Keep
            it with the checkpoint.

    Raises:
        ValueError: ``every`` is no int of at least 0, or a limit is not positive.

    Forward passes inside ``torch.compile`` or a replayed CUDA graph run no hooks: there, loss and
    gradients are what is looked at. With a gradient scaler, whose gradients overflow on purpose,
    check after ``unscale_`` and only steps that it takes.

    Cost: at a check one pass over the layers' inputs and one over the gradients; for the inverse 8
    products with W and 8 with R, of one sample. Between checks nothing but the loss, and on the
    CPU ``grad_norm``. Other devices are not waited for between checks.

    >>> import snf_ext
    >>> flow = snf_ext.Flow([snf_ext.SelfNormLinear(4)], event_shape=(4,))
    >>> optimizer, guard = torch.optim.Adam(flow.parameters()), DivergenceGuard(flow, every=2)
    >>> for step, x in enumerate(torch.randn(5, 16, 4)):
    ...     optimizer.zero_grad()
    ...     with guard.step():
    ...         loss = flow.loss(x)
    ...         loss.backward()
    ...     try:
    ...         guard.check(loss, x)
    ...     except snf_ext.Diverged as error:
    ...         print(str(error).partition(" is ")[0])
    ...         break
    ...     optimizer.step()
    ...     if step == 2:
    ...         _ = flow.bijections[0].weight_inv.data.mul_(100)
    training diverged: the relative reconstruction error of bijections.0 (SelfNormLinear)
    """

    def __init__(
        self,
        flow: Flow,
        every: int = 100,
        check_inverse: bool = False,
        *,
        recon_limit: float = 10.0,
        inverse_limit: float = 10.0,
    ) -> None:
        if type(every) is not int or every < 0:
            raise ValueError(f"every must be an int of at least 0; got {every!r}")
        for name, limit in (("recon_limit", recon_limit), ("inverse_limit", inverse_limit)):
            if not limit > 0:
                raise ValueError(f"{name} must be positive; got {limit!r}")
        self.flow, self.every, self.check_inverse = flow, every, check_inverse
        self.recon_limit, self.inverse_limit = recon_limit, inverse_limit
        self.steps = 0
        self.start: dict[str, float] = {}
        self._seen: dict[str, _Seen] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround loss and backward of one step."""
        self.steps += 1
        self._seen = {}
        handles = []
        if self.due(self.steps):
            for name, module in self.flow.named_modules():
                if isinstance(module, Learned):
                    handles.append(module.register_forward_hook(partial(self._see, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def due(self, step: int) -> bool:
        """Whether step 1, 2, ... is one at which more than the loss is looked at."""
        return self.every > 0 and (step == 1 or step % self.every == 0)

    @torch.no_grad()
    def _see(self, name: str, layer: Learned, args: tuple[Any, ...], step: FlowStep) -> None:
        x = args[0].detach()  # recon may hold other terms, weights, or nothing
        back = layer.inverse(step.z)
        before = self._seen.get(name)
        error, size = _square(back.to(wide_dtype(x.dtype)) - x), _square(x)
        if before is not None:
            error, size = error + before.error, size + before.size
        self._seen[name] = _Seen(layer, x, error, size)

    def check(
        self,
        loss: Tensor | float,
        x: Tensor,
        context: Tensor | None = None,
        grad_norm: Tensor | None = None,
    ) -> None:
        """Look at a step between backward and the optimizer's step.

        Args:
            loss: of the step.
            x, context: what it was computed from, to find where it went wrong.
            grad_norm: norm of all gradients, if it is known anyway. Then these must not be clipped
                yet: clipping spreads what is not finite.

        Raises:
            Diverged: it must not go on; cause, layer, limit and what to change are in the message.
        """
        seen, self._seen = self._seen, {}
        due = self.due(self.steps)
        if due or not isinstance(loss, Tensor) or loss.device.type == "cpu":
            value = loss.item() if isinstance(loss, Tensor) else loss
            self._check_loss(value, x, context)
        if due:
            self._check_reconstruction(seen)
        if due or (grad_norm is not None and grad_norm.device.type == "cpu"):
            self._check_gradients(grad_norm)
        if due and self.check_inverse:
            self._check_norms(seen)

    def _check_loss(self, loss: float, x: Tensor, context: Tensor | None) -> None:
        if math.isfinite(loss):
            return
        if not x.isfinite().all():
            self._stop(f"the loss is {loss} (x is not finite)", "input")
        try:
            found = first_not_finite(self.flow, x, context)
        except Exception as error:  # no memory for the copy, say: it must not hide the finding
            found = f"where, is not known: {error}"
        self._stop(f"the loss is {loss}" + (f" ({found})" if found else ""), "loss")

    def _check_reconstruction(self, seen: dict[str, _Seen]) -> None:
        if not seen:
            return
        tiny = torch.finfo(torch.float32).tiny
        ratios = [at.error / at.size.clamp(min=tiny) for at in seen.values()]
        errors = dict(zip(seen, torch.stack(ratios).tolist(), strict=True))
        if self.steps == 1:
            self.start = {name: error for name, error in errors.items() if 1 < error < math.inf}
        limits = {name: self.recon_limit * max(1.0, self.start.get(name, 1.0)) for name in errors}
        self._hold("the relative reconstruction error", "reconstruction", seen, errors, limits)

    def _check_gradients(self, norm: Tensor | None) -> None:
        gradients = {
            name: parameter.grad
            for name, parameter in self.flow.named_parameters()
            if parameter.grad is not None
        }
        if norm is None:
            norm = get_total_norm(gradients.values())
        if math.isfinite(norm.item()):
            return
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if not bad:  # only the norm's squares overflow
            return
        # Backward comes to the last layer first, and hands on what it finds there.
        others = f" (nor are {len(bad) - 1} others)" if len(bad) > 1 else ""
        self._stop(f"the gradient of {bad[-1]} is not finite{others}", "gradient")

    def _check_norms(self, seen: dict[str, _Seen]) -> None:
        norms = {name: norm_of_error(at.layer, at.x, name) for name, at in seen.items()}
        limits = dict.fromkeys(norms, self.inverse_limit)
        self._hold("||I - R W||", "inverse", seen, norms, limits)

    def _hold(
        self,
        what: str,
        advice: str,
        seen: dict[str, _Seen],
        values: dict[str, float],
        limits: dict[str, float],
    ) -> None:
        """Stop for the layer that is furthest past its limit, if one is."""
        excess = {
            name: value / limits[name] if math.isfinite(value) else math.inf
            for name, value in values.items()
        }
        worst = max(excess, key=excess.__getitem__, default=None)
        if worst is not None and excess[worst] > 1:
            name = f"{worst} ({type(seen[worst].layer).__name__})"
            limit = f"over the limit of {limits[worst]:.3g}"
            self._stop(f"{what} of {name} is {values[worst]:.3g}, {limit},", advice)

    def _stop(self, cause: str, advice: str) -> NoReturn:
        advice, step = ADVICE[advice], self.steps
        message = f"training diverged: {cause} in step {step}; {advice}"
        raise Diverged(message, cause=cause, advice=advice, step=step)


class _Seen(NamedTuple):
    """A layer in one step: its last input, and the two sums of its relative error."""

    layer: Learned
    x: Tensor
    error: Tensor
    size: Tensor


def first_not_finite(flow: Flow, x: Tensor, context: Tensor | None = None) -> str:
    """Where NaN or inf first appears on the way of ``x`` to noise, in words; "" if it does not.

    The batch is run again through a copy of the flow, which keeps its own state and random numbers;
    random layers draw anew.
    """
    flow = copy.deepcopy(flow)
    found: list[str] = []

    def look(name: str, layer: Bijection, args: tuple[Any, ...], step: FlowStep) -> None:
        bad = [part for part, value in step._asdict().items() if not value.isfinite().all()]
        if found or not bad:
            return
        weights = [name for name, p in layer.named_parameters() if not p.isfinite().all()]
        cause = f"; its {weights[0]} is not finite" if weights else ""
        found.append(f"first in {bad[0]} of {name}, {type(layer).__name__}{cause}")

    for name, module in flow.named_modules():
        if isinstance(module, Bijection):  # those inside others end, and are seen, before them
            module.register_forward_hook(partial(look, name))
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        flow(x, context)
    return found[0] if found else ""


@torch.no_grad()
def norm_of_error(layer: Learned, x: Tensor, name: str = "") -> float:
    """A lower bound of ``||I - R W||``, by power iteration; of a general bijection at events of x.

    There it is ``||I - J_g J_f||``, the median over the first eight events. The start depends on
    ``name`` alone.

    >>> import snf_ext
    >>> layer = snf_ext.SelfNormLinear(8)
    >>> layer.weight_inv.data.copy_(layer.weight.inverse().mul(-20)).shape
    torch.Size([8, 8])
    >>> round(norm_of_error(layer, torch.randn(3, 8)), 3)  # of I + 20 I
    21.0
    """
    error, shape, dtype = _error(layer, x)
    generator = torch.Generator().manual_seed(derive_seed("norm_of_error", name))
    v = torch.randn(shape, generator=generator).to(x.device, dtype)
    size = torch.zeros(())
    for _ in range(POWER_STEPS):
        v = (v / _norm(v).clamp(min=torch.finfo(dtype).tiny)).requires_grad_()
        with torch.enable_grad():
            moved = error(v)
        size = _norm(moved.detach())
        (v,) = torch.autograd.grad(moved, v, moved.detach())
    return size.median().item()


def _error(layer: Learned, x: Tensor) -> tuple[EventMap, torch.Size, torch.dtype]:
    """``v -> v - R W v``, and the shape and dtype of v."""
    if isinstance(layer, SelfNormBijection):
        f, g, x = layer.f, layer.g, x[:EVENTS]
        return lambda v: v - pushed(lambda x: g(f(x)), x, v[None])[1][0], x.shape, x.dtype
    dtype = wide_dtype(layer.weight.dtype)
    forward, backward = (
        partial(layer._map, weight.detach().to(dtype))
        for weight in (layer.weight, layer.weight_inv)
    )
    event = x.shape[x.dim() - layer.event_dims :]
    return lambda v: v - backward(forward(v)), torch.Size((1, *event)), dtype


def _square(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype)).square().sum()


def _norm(x: Tensor) -> Tensor:
    """Of each event, in a shape that divides events."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
