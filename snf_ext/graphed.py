"""A whole training step as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .backend import backend
from .flow import Flow
from .layers.learned_inverse import LearnedInverse

MAX_GRAPHS = 4

_T = TypeVar("_T")


class GraphedStep:
    """A training step that replays one CUDA graph, or runs eagerly and says why.

    ``step(x)`` does, step for step and with the same random numbers, what this does::

        optimizer.zero_grad()
        loss = flow.loss(x)
        loss.backward()
        after_backward()  # if given
        optimizer.step()
        return loss.detach()

    The first ``warmup`` batches of a shape are ordinary steps. The next one is captured and
    replayed, later ones are only replayed: one launch instead of one for each kernel. At most
    ``MAX_GRAPHS`` = 4 shapes get a graph, so that a short last batch has one of its own. Whatever
    stands in the way (a CPU, an optimizer that is not capturable, evaluation mode, an error while
    capturing) makes the call an ordinary step.

    Python runs while capturing and not while replaying, hooks included. The graph fixes the
    numbers that Python reads and the places of tensors: after a change of a hyperparameter such
    as ``lr``, of ``recon_weight``, of what requires a gradient, or of the place of parameters and
    optimizer state, all graphs are dropped and the warm-up starts again. A schedule that changes
    ``lr`` in every step should therefore keep it in a tensor on the GPU, which schedulers change
    in place: Adam takes one with ``capturable=True``, SGD with ``fused=True``. After any other
    change call :meth:`reset`.

    Not covered: ``GradScaler``; under autocast steps are eager. Parameters that the loss reaches
    must be in the optimizer. ``p.grad`` after a replay is valid until the next one.

    Args:
        flow: in training mode.
        optimizer: over its parameters, ``capturable=True`` where there is such an option.
        loss: maps x to a scalar tensor; ``flow.loss`` if None. Must not wait for the GPU.
        warmup: number of ordinary steps before a capture, at least 1.
        after_backward: called between backward and the optimizer, for instance to clip gradients.
            Must not wait for the GPU.

    Attributes:
        reason: why the last step ran eagerly, None if it was a graph's.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``warmup`` is less than 1.

    Cost: a graph keeps its batch, gradients and intermediate results in memory of its own.

    >>> import snf_ext
    >>> flow = snf_ext.models.fc((1, 4, 4))
    >>> optimizer = torch.optim.Adam(flow.parameters(), fused=True, capturable=True)
    >>> step = snf_ext.GraphedStep(flow, optimizer)
    >>> loss = step(torch.randint(0, 256, (8, 1, 4, 4)))
    >>> loss.shape, step.graphed, step.reason
    (torch.Size([]), False, 'x is on cpu: CUDA graphs need a CUDA device')
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[[Tensor], Tensor] | None = None,
        warmup: int = 3,
        after_backward: Callable[[], object] | None = None,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a Flow; got {type(flow).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be an Optimizer; got {type(optimizer).__name__}")
        for name, function in (("loss", loss), ("after_backward", after_backward)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable; got {type(function).__name__}")
        if warmup < 1:  # optimizers make their state in the first step
            raise ValueError(f"warmup must be at least 1; got {warmup}")
        self.flow, self.optimizer, self.warmup = flow, optimizer, warmup
        self._loss = flow.loss if loss is None else loss
        self._after_backward = after_backward
        self._modules = list(flow.modules())
        self._inverses = [m for m in self._modules if isinstance(m, LearnedInverse)]
        self._cuda = _Cuda()
        self.reason: str | None = "no batch yet"
        self.reset()

    @property
    def graphed(self) -> bool:
        """Whether the last step was a graph's."""
        return self.reason is None

    def reset(self) -> None:
        """Forget all graphs and errors; the warm-up starts again."""
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._eager_steps: dict[tuple[Any, ...], int] = {}
        self._fixed = self._read_fixed()
        self._restarted = ""
        self._failure: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """One training step on ``x``: its loss, a scalar without gradient.

        Raises:
            TypeError: ``x`` is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor; got {type(x).__name__}")
        if x.device.type != self._cuda.type:
            self.reason = f"x is on {x.device}: CUDA graphs need a CUDA device"
            return self._eager(x)
        fixed = self._read_fixed()
        if fixed != self._fixed:
            self._restarted = f", because {_first_difference(self._fixed, fixed)} changed"
            self._graphs.clear()
            self._eager_steps.clear()
            self._fixed = fixed
        key = (
            *(x.shape, x.dtype, x.device, x.requires_grad),
            *(torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), backend()),
        )
        graph = self._graphs.get(key)
        if graph is None:
            self.reason = self._obstacle(x)
            if self.reason is not None:
                return self._settled(self._eager(x))
            done = self._eager_steps.get(key, 0)
            if done < self.warmup:
                self.reason = f"warming up, step {done + 1} of {self.warmup}{self._restarted}"
                loss = self._settled(self._cuda.aside(x.device, partial(self._eager, x)))
                self._eager_steps[key] = done + 1
                return loss
            graph = self._capture(x)
            if graph is None:
                self.reason = self._failure
                return self._settled(self._eager(x))
            self._graphs[key], self._restarted = graph, ""
        self.reason = None
        for layer in self._inverses:
            layer.keep_up()
        with self._inverses_held():
            return graph.step(x)

    @contextmanager
    def _inverses_held(self) -> Iterator[None]:
        """Tracked inverses are fitted outside of graphs: when, is for Python to say."""
        for layer in self._inverses:
            layer.held = True
        try:
            yield
        finally:
            for layer in self._inverses:
                layer.held = False

    def _eager(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        return self._after_zero_grad(x)

    def _after_zero_grad(self, x: Tensor) -> Tensor:
        loss = self._loss(x)
        loss.backward()
        if self._after_backward is not None:
            self._after_backward()
        self.optimizer.step()
        return loss.detach()

    def _settled(self, loss: Tensor) -> Tensor:
        """``loss`` of an eager step, in which the optimizer may have made its state."""
        fixed = self._read_fixed()
        if fixed != self._fixed:
            self._graphs.clear()
            self._fixed = fixed
        return loss

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _read_fixed(self) -> dict[str | tuple[str, int], Any]:
        """What a graph takes as fixed: the values of settings, the places of tensors."""
        fixed: dict[str | tuple[str, int], Any] = {
            (name, index): self._value_or_place(value)
            for index, group in enumerate(self.optimizer.param_groups)
            for name, value in group.items()
            if name != "params"
        }
        parameters = self._parameters()
        fixed["recon_weight"] = self._value_or_place(self.flow.recon_weight)
        fixed["reversible"] = self.flow.reversible
        fixed["the mode of a module"] = [module.training for module in self._modules]
        fixed["what requires a gradient"] = [p.requires_grad for p in parameters]
        fixed["the place of a parameter"] = [p.data_ptr() for p in parameters]
        fixed["the optimizer's state"] = [
            value.data_ptr() if isinstance(value, Tensor) else value
            for entries in self.optimizer.state.values()
            for value in entries.values()
        ]
        return fixed

    def _value_or_place(self, value: Any) -> Any:
        """A tensor on the GPU may change its value under a graph, anything else may not."""
        if isinstance(value, Tensor):
            return value.data_ptr() if value.device.type == self._cuda.type else value.tolist()
        if isinstance(value, (tuple, list)):
            return [self._value_or_place(item) for item in value]
        return value

    def _obstacle(self, x: Tensor) -> str | None:
        """Why this step cannot be captured, as far as can be known beforehand."""
        name = type(self.optimizer).__name__
        if not self.flow.training:
            return "flow is in evaluation mode, where exact values wait for the GPU; use train()"
        if self.flow.reversible is not None:
            return "flow is reversible, and looks at what it rebuilt; use flow.reversible = None"
        if x.requires_grad:
            return "x requires a gradient, which a graph would overwrite instead of adding to it"
        if not torch.is_grad_enabled():
            return "gradients are disabled"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on, which graphs do not cover"
        if not all(group.get("capturable", True) for group in self.optimizer.param_groups):
            return f"{name} has capturable=False; pass capturable=True"
        parameters = self._parameters()
        for p in parameters:
            if p.device != x.device:
                return f"a parameter is on {p.device} and x on {x.device}"
        optimized = set(parameters)
        for path, p in self.flow.named_parameters():
            if p.requires_grad and p not in optimized:
                return f"{path} requires a gradient, but {name} does not have it"
        for entries in self.optimizer.state.values():
            for entry, value in entries.items():
                if value is not None and getattr(value, "device", None) != x.device:
                    return f"{name} keeps {entry!r} off {x.device}, where a graph cannot change it"
        if len(self._graphs) >= MAX_GRAPHS:
            return f"{MAX_GRAPHS} other shapes have graphs"
        return self._failure

    def _capture(self, x: Tensor) -> _Captured | None:
        """A graph for batches like ``x``, or None with ``_failure`` set and nothing changed."""
        optimizer = self.optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        state = {p: dict(entries) for p, entries in optimizer.state.items()}
        random = torch.get_rng_state()
        batch = x.clone()
        # Gradients must be made while capturing: in the graph's own memory, at fixed places.
        optimizer.zero_grad()
        try:
            with self._inverses_held():
                replay, loss = self._cuda.capture(x.device, partial(self._after_zero_grad, batch))
            fixed = self._read_fixed()
            if fixed != self._fixed:
                raise RuntimeError(f"{_first_difference(self._fixed, fixed)} changes in every step")
            if not torch.equal(torch.get_rng_state(), random):
                raise RuntimeError("the step draws random numbers on the CPU")
        except Exception as error:
            # Nothing ran on the GPU; what Python did is undone.
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(kept)
            optimizer.state.clear()
            optimizer.state.update(state)
            torch.set_rng_state(random)
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._failure = f"capture failed: {cause}; reset() allows another try"
            message = f"training steps run eagerly: {self._failure}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return None
        return _Captured(batch, loss, [(p, p.grad) for p in self._parameters()], replay)


class _Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    x: Tensor
    loss: Tensor
    grads: list[tuple[Tensor, Tensor | None]]
    replay: Callable[[], None]

    def step(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.replay()
        for p, grad in self.grads:
            if p.grad is not grad:
                p.grad = grad
        return self.loss.clone()


class _Cuda:
    """What is asked of CUDA: to run work on a stream of its own, and to capture it there."""

    type = "cuda"
    _broken: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def aside(self, device: torch.device, work: Callable[[], _T]) -> _T:
        """Run ``work`` where it will be captured, so that the stream's workspaces are there."""
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = work()
        current.wait_stream(stream)
        return result

    def capture(
        self, device: torch.device, work: Callable[[], _T]
    ) -> tuple[Callable[[], None], _T]:
        """What runs ``work``, which is not run now, and the tensors it will write."""
        stream, graph = self._stream(device), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        try:
            # The outer context is left even where the inner one fails on the way out.
            # "thread_local": a data loader's thread may pin memory meanwhile.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                result = work()
        except Exception as error:
            broken_off = self._mend(stream, graph, pool)
            if broken_off and error.__context__ is not None:
                raise error.__context__ from error  # the one that broke it off
            raise
        return graph.replay, result

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _mend(self, stream: torch.cuda.Stream, graph: torch.cuda.CUDAGraph, pool: Any) -> bool:
        """Whether CUDA broke the capture off; what that leaves behind in torch is undone.

        In torch 2.11 the allocator goes on waiting for the end, so that ``empty_cache`` fails, and
        the random number generator works in no eager step until a capture has ended well.
        """
        try:
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        except RuntimeError:  # it ended well, and only the work failed
            return False
        torch._C._cuda_releasePool(stream.device_index, pool)
        self._broken.append(graph)  # the allocator of pinned memory keeps a pointer to it
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        ):
            torch.zeros((), device=stream.device)
        return True


def _first_difference(
    old: dict[str | tuple[str, int], Any], new: dict[str | tuple[str, int], Any]
) -> str:
    name = next(n for n in [*new, *old] if n not in old or n not in new or old[n] != new[n])
    return name if isinstance(name, str) else f"{name[0]} of parameter group {name[1]}"
