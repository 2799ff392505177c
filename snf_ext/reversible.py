"""Training that keeps no activations: backward rebuilds them, last to first, by the inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import passes
from .backend import backend, use_backend
from .bijection import Bijection, FlowStep, per_sample_sum, per_sample_zeros
from .refine import checked_steps
from .rerun import FirstRun, autocast_of_now

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}
_SUMS = 4  # random sums that an input is known by: the more, the less is missed by chance


@dataclass(frozen=True)
class Reversible:
    """How a flow whose activations are not kept rebuilds them: ``flow.reversible = Reversible()``.

    The forward pass of :meth:`Flow.loss`, :meth:`Flow.log_prob` and the flow itself keeps the final
    output and a few numbers a sample. Backward goes from the last bijection to the first: it
    rebuilds the input from the output by ``Bijection.undo``, runs this one bijection again with
    gradients, and sends them back through it alone. Values are those of the ordinary mode to the
    bit, gradients up to the error of what is rebuilt.

    - What draws random numbers draws the same ones again. What keeps state (actnorm's start, batch
      norm, controllers, tracked inverses, buffers of any network) changes it once.
    - Inputs of bijections with ``undoes = False`` are kept: :class:`Dequantize`, zuko's
      transforms, and any layer where you set it. Nothing is done for those before the first
      parameter, as autograd needs nothing there either.
    - A :class:`SplitPrior` is undone part by part; it keeps its coupling's output besides.
    - Each input's error is measured: at the start a layer keeps four random sums of it a sample,
      which are compared with those of the rebuilt one. So errors that add up on the way are seen.

    Args:
        refine: the most steps by which a learned inverse is refined; on a GPU all are taken, so
            that nothing waits.
        exact: take the true inverse instead. Of a self-normalizing layer that is a factorisation
            in each step.
        limit: the largest error of a rebuilt input, relative to the norm of the sample; if None
            1e-4, in float64 1e-9.

    Raises:
        ValueError: ``refine`` is no int of at least 0, or ``limit`` is not positive.

    In backward :class:`NotReversible` is raised where an error exceeds the limit;
    ``NotImplementedError`` where a second derivative is wanted. Inputs in half precision are kept.
    Forward hooks see each layer twice. ``GraphedStep`` takes its steps eagerly; ``torch.compile``
    leaves the flow's passes alone, and with ``fullgraph=True`` says why. Parameters, the data and
    the context get gradients, no other tensor that a layer may have at hand.

    Cost: a second forward pass, and one through the inverses: two products and two more for each
    step of refinement; two to four times an ordinary step. On a GPU backward waits for the device
    once, at its end, and once more for each split prior.
    Source: Gomez et al. 2017, "The reversible residual network: backpropagation without storing
    activations"; the check is our own.

    >>> import snf_ext
    >>> flow = snf_ext.models.conv((1, 8, 8), layers=3)
    >>> flow.reversible = snf_ext.Reversible()
    >>> flow.loss(torch.randint(256, (5, 1, 8, 8))).backward()
    """

    refine: int = 10
    exact: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        checked_steps(self.refine, "refine")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite; got {self.limit}")
        if _uncompiled is None:  # before anything is compiled
            _leave_uncompiled()

    def limit_in(self, dtype: torch.dtype) -> float:
        """The largest relative error of an input of ``dtype``."""
        return LIMITS[dtype] if self.limit is None else self.limit


class NotReversible(RuntimeError):
    """A layer's input could not be rebuilt from its output; no gradient was made of it.

    Attributes:
        layer: the layer's name.
        error: of its input, relative.
    """

    def __init__(self, message: str, layer: str, error: float) -> None:
        super().__init__(message)
        self.layer, self.error = layer, error


def push(
    how: Reversible,
    root: nn.Module,
    bijections: Iterable[Bijection],
    x: Tensor,
    context: Tensor | None,
    exact: bool,
) -> FlowStep:
    """As :func:`snf_ext.bijection.push`, keeping no activations; ``root`` knows layers' names."""
    if _uncompiled is None:
        _leave_uncompiled()
    assert _uncompiled is not None
    return _uncompiled(how, root, bijections, x, context, exact)


_uncompiled: Callable[..., FlowStep] | None = None


def _leave_uncompiled() -> None:
    """Have torch.compile leave ``_push`` alone: not on import, as what that takes is slow."""
    global _uncompiled
    reason = "a reversible flow decides in Python what to keep; it runs uncompiled"
    _uncompiled = torch.compiler.disable(_push, reason=reason)


def _push(
    how: Reversible,
    root: nn.Module,
    bijections: Iterable[Bijection],
    x: Tensor,
    context: Tensor | None,
    exact: bool,
) -> FlowStep:
    z, log_det, recon = x, per_sample_zeros(x), per_sample_zeros(x)
    context_learns = context is not None and context.requires_grad
    nested = partial(_push, how, root)
    for bijections_, undone in _grouped(bijections, x.requires_grad or context_learns):
        if undone:
            z, *sums = _chain(_Pass(how, root, bijections_, exact), z, context)
        else:
            with passes.run_by(nested):
                step = _run(bijections_[0], z, context, exact)
            z, sums = step.z, [per_sample_sum(step.log_det), per_sample_sum(step.recon)]
        for more in sums[::2]:
            log_det = log_det + more
        for more in sums[1::2]:
            recon = recon + more
    return FlowStep(z, log_det, recon)


def _grouped(
    bijections: Iterable[Bijection], learns: bool
) -> Iterator[tuple[list[Bijection], bool]]:
    """Chains that are undone, between single bijections that autograd sees to.

    These are what comes before the first gradient, and what chains others itself.
    """
    chain: list[Bijection] = []
    for bijection in bijections:
        learns = learns or any(p.requires_grad for p in bijection.parameters())
        if learns and not bijection.nests:
            chain.append(bijection)
            continue
        if chain:
            yield chain, True
            chain = []
        yield [bijection], False
    if chain:
        yield chain, True


def _run(bijection: Bijection, x: Tensor, context: Tensor | None, exact: bool) -> FlowStep:
    return bijection.exact_forward(x, context) if exact else bijection(x, context)


def _chain(run: _Pass, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """z, and log_det and recon of each bijection in turn."""
    return _Chain.apply(run, x, context, *run.parameters)


class _Pass:
    """One pass through a chain of bijections."""

    def __init__(
        self, how: Reversible, root: nn.Module, bijections: Sequence[Bijection], exact: bool
    ) -> None:
        self.how, self.root, self.bijections, self.exact = how, root, bijections, exact
        learn = [p for b in bijections for p in b.parameters() if p.requires_grad]
        self.parameters = list(dict.fromkeys(learn))
        self.runs: list[FirstRun] = []
        self.sums: list[Tensor | None] = []  # of inputs; None where they are kept

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """z, and log_det and recon of each bijection; and the inputs that must be kept."""
        self.autocast, self.backend = autocast_of_now(x.device.type), backend()
        x, context = x.detach(), None if context is None else context.detach()
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []
        for bijection in self.bijections:
            # As in ordinary training; the graph goes as soon as the outputs are off it.
            with torch.enable_grad(), FirstRun.watched(bijection, x.device) as run:
                step = _run(bijection, x, context, self.exact)
            self.runs.append(run)
            if bijection.undoes and step.z.dtype == x.dtype and x.dtype in LIMITS:
                self.sums.append(_sums(x))
            else:
                self.sums.append(None)
                inputs.append(x)
            x = step.z.detach()
            outputs += [per_sample_sum(s).detach() for s in (step.log_det, step.recon)]
        return [x, *outputs], inputs

    def backward(
        self,
        z: Tensor,
        context: Tensor | None,
        inputs: list[Tensor],
        grads: Sequence[Tensor | None],
        wants_x: bool,
        wants_context: bool,
    ) -> list[Tensor | None]:
        """Gradients of x, context and parameters, from those of :meth:`forward`'s outputs."""
        inputs = list(inputs)
        delta, *of_sums = grads
        of_parameters: dict[Tensor, Tensor] = {}
        of_context: Tensor | None = None
        errors: list[tuple[Bijection, torch.dtype, Tensor]] = []
        self._check_parameters()
        steps = 0 if self.how.exact else self.how.refine
        with self.autocast(), use_backend(self.backend):
            for i in reversed(range(len(self.bijections))):
                bijection, run, sums = self.bijections[i], self.runs[i], self.sums[i]
                if sums is None:
                    x = inputs.pop()
                else:
                    with torch.no_grad(), run.again():
                        x = bijection.undo(z, context, self.how.exact, steps)
                    errors.append((bijection, x.dtype, _error(x, _sums(x), sums)))
                x = x.detach().requires_grad_(x.is_floating_point() and (i > 0 or wants_x))
                there = context
                if context is not None:
                    there = context.detach().requires_grad_(wants_context)
                with run.again():
                    with torch.enable_grad():
                        step = _run(bijection, x, there, self.exact)
                        ends = (step.z, per_sample_sum(step.log_det), per_sample_sum(step.recon))
                    asked = [x, *([] if there is None else [there]), *bijection.parameters()]
                    found = _gradients(ends, (delta, *of_sums[2 * i : 2 * i + 2]), asked)
                delta = found.pop(x, None)
                if there is not None:
                    of_context = _added(of_context, found.pop(there, None))
                for p, grad in found.items():
                    of_parameters[p] = of_parameters[p] + grad if p in of_parameters else grad
                z = x.detach()
                del step, ends, found
        self._hold(errors)
        return [delta, of_context, *map(of_parameters.get, self.parameters)]

    def _check_parameters(self) -> None:
        now = {p for b in self.bijections for p in b.parameters()}
        if not now.issuperset(self.parameters):
            raise RuntimeError(
                "the parameters of a reversible flow must be the same tensors in backward as they "
                "were in forward; got others, as after functional_call"
            )

    def _hold(self, errors: Sequence[tuple[Bijection, torch.dtype, Tensor]]) -> None:
        """NotReversible if an error is over its limit. The one wait for a GPU."""
        if not errors:
            return
        values = torch.stack([error.float() for _, _, error in errors]).tolist()
        for (bijection, dtype, _), error in zip(errors, values, strict=True):
            limit = self.how.limit_in(dtype)
            if error > limit:  # the first: those nearer to the data start from what it left
                names = {module: name for name, module in self.root.named_modules()}
                name = names.get(bijection, "a layer")
                raise NotReversible(
                    f"the input of {name} ({type(bijection).__name__}) was rebuilt with a relative "
                    f"error of {error:.2g}, over the limit of {limit:g}, so that there is no "
                    f"gradient. Take a larger refine than {self.how.refine}, or "
                    "Reversible(exact=True), or let this layer keep its input by undoes = False",
                    name,
                    error,
                )


class _Chain(torch.autograd.Function):
    """A :class:`_Pass` for autograd, as one node."""

    @staticmethod
    def forward(
        ctx: Any, run: _Pass, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, inputs = run.forward(x, context)
        ctx.run, ctx.kept = run, len(inputs)
        ctx.set_materialize_grads(False)
        # The parameters are saved for autograd to see whether they changed in between.
        ctx.save_for_backward(outputs[0], context, *inputs, *parameters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "double backward through a reversible flow is not supported: what is rebuilt in "
                "backward has no graph; set flow.reversible = None"
            )
        z, context, *kept = ctx.saved_tensors
        _, wants_x, wants_context, *_ = ctx.needs_input_grad
        inputs = kept[: ctx.kept]
        return (None, *ctx.run.backward(z, context, inputs, grads, wants_x, wants_context))


def _gradients(
    ends: Sequence[Tensor], grads: Sequence[Tensor | None], asked: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """Of those asked for that have one."""
    given = [(e, g) for e, g in zip(ends, grads, strict=True) if g is not None and e.requires_grad]
    asked = [t for t in dict.fromkeys(asked) if t.requires_grad]
    if not given or not asked:
        return {}
    outputs, grad_outputs = zip(*given, strict=True)
    found = torch.autograd.grad(outputs, asked, grad_outputs, allow_unused=True)
    return {t: g for t, g in zip(asked, found, strict=True) if g is not None}  # type: ignore[redundant-expr]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sums(x: Tensor) -> Tensor:
    """Four sums of each sample with random signs, ``(B, 4)``; the signs are always the same.

    The mean square of such a sum is the sample's squared norm.
    """
    vectors = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    generator = torch.Generator(x.device).manual_seed(0)
    drawn = torch.rand((vectors.shape[1], _SUMS), generator=generator, device=x.device)
    return vectors @ torch.where(drawn < 0.5, -1.0, 1.0).to(x.dtype)


def _error(x: Tensor, sums: Tensor, true_sums: Tensor) -> Tensor:
    """The largest relative error of a sample, a scalar."""
    if not x.numel():
        return x.new_zeros(())
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1) if x.dim() > 1 else x.abs()
    error = (sums - true_sums).square().mean(1).sqrt()
    error = error / norm.clamp(min=torch.finfo(x.dtype).tiny)
    # What was not finite before has no gradient in the ordinary mode either.
    usable = true_sums.isfinite().all(1)
    return torch.where(usable, error.nan_to_num(nan=math.inf), 0).amax()
