"""The angle between the self-normalizing and the exact gradient while training runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import exact
from ..bijection import FlowStep, wide_dtype
from ..flow import Flow
from ..layers import SelfNormLinear
from ..ops.self_norm import conv2d_weight_gradient
from ..reference.convolution import inverse_term
from .angle import Learned, degrees, measured


class GradientMonitor:
    """Measures, every so many training steps, how far each layer's gradient is from the exact one.

    The angle is that of :func:`snf_ext.gradient_angle`, on the batch that the step trains on: with
    delta the gradient of the loss in z and S the sum of its gradients in log_det,

        self-normalizing   1/2 delta x' + 1/2 S R'
        exact                  delta x' + S W^-T

    flattened, without the reconstruction term; a convolution has the same with its kernel.
    Common factors of the loss (bits/dim, loss scaling) cancel, several backward passes add up.
    The training step itself stays what it is, to the bit.

    Args:
        flow: the flow that is trained.
        every: steps from one measurement to the next.

    Attributes:
        steps: how many steps were begun. Set it where training goes on from a checkpoint.
        last_step: the number of the last measured step, counted from 1; None before.
        angles: ``{layer name: degrees}`` of that step, in the order of ``flow.named_modules()``.
            nan where a gradient is zero or not finite, or the layer singular. Layers that did not
            run and those of ``training.angle.too_large`` are left out.

    Raises:
        ValueError: ``every`` is not a positive int.

    What counts is calls of the flow or its layers while they are recorded by autograd, as in
    :meth:`Flow.loss`; not ``log_prob``, the log-determinant penalty (which asks layers for
    ``exact_forward`` and adds nothing here), or anything under ``no_grad``. Layers inside
    ``torch.compile`` or a replayed CUDA graph run no hooks: measure an eager step.

    Cost: nothing in the steps between. A measurement takes one weight gradient a layer, and
    log |det| with its exact gradient, of a convolution in the layer's own precision. No activations
    are kept beyond the backward pass.

    Source: SNF section 5.3 and Figure 3.

    >>> import snf_ext
    >>> flow = snf_ext.Flow([snf_ext.SelfNormLinear(4)], event_shape=(4,))
    >>> optimizer = torch.optim.Adam(flow.parameters())
    >>> monitor = GradientMonitor(flow, every=2)
    >>> for x in torch.randn(5, 16, 4):
    ...     optimizer.zero_grad()
    ...     with monitor.step():
    ...         flow.loss(x).backward()
    ...     optimizer.step()
    >>> monitor.last_step, 0 < monitor.angles["bijections.0"] < 90
    (4, True)
    """

    def __init__(self, flow: Flow, every: int = 100) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be a positive int; got {every!r}")
        self.flow, self.every = flow, every
        self.steps = 0
        self.last_step: int | None = None
        self.angles: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether step 1, 2, ... is measured."""
        return step % self.every == 0

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Surround loss and backward of one step, or several of each; whether it is measured.

        An exception in the block goes through, and nothing is measured.
        """
        self.steps += 1
        if not self.due(self.steps):
            yield False
            return
        watches = {name: _Watch(layer) for name, layer in measured(self.flow).items()}
        try:
            yield True
        finally:
            for watch in watches.values():
                watch.close()
        self.angles = {name: watch.angle() for name, watch in watches.items() if watch.ran}
        self.last_step = self.steps


class _Watch:
    """One layer during one step: adds up what its two gradients are made of."""

    def __init__(self, layer: Learned) -> None:
        self.layer = layer
        self.ran = False
        # S for each image size, which the gradients of log |det| depend on.
        self._log_det: dict[tuple[int, ...], Tensor] = {}
        self._handles: list[RemovableHandle] = [layer.register_forward_hook(self._see)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, layer: Learned, args: tuple[Any, ...], step: FlowStep) -> None:
        if not step.z.requires_grad:
            return
        if not self.ran:  # copies: the block may end with the optimizer's step
            self.ran = True
            self._weight = layer.weight.detach().to(torch.float64, copy=True)
            self._inverse = layer.weight_inv.detach().to(torch.float64, copy=True)
            self._data = torch.zeros_like(self._weight)  # delta' x
        x = args[0].detach()
        image = () if isinstance(layer, SelfNormLinear) else tuple(x.shape[2:])
        self._handles.append(step.z.register_hook(partial(self._add_data, x)))
        if step.log_det.requires_grad:
            self._handles.append(step.log_det.register_hook(partial(self._add_log_det, image)))

    @torch.no_grad()
    def _add_data(self, x: Tensor, delta: Tensor | None) -> None:
        if delta is None:  # z is of no use to the loss
            return
        wide = wide_dtype(x.dtype)
        x, delta = x.to(wide), delta.to(wide)
        if isinstance(self.layer, SelfNormLinear):
            self._data += delta.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            weight = self._weight.to(wide)
            self._data += conv2d_weight_gradient(delta, x, weight, *self.layer.shape.geometry)

    @torch.no_grad()
    def _add_log_det(self, image: tuple[int, ...], gradient: Tensor | None) -> None:
        if gradient is not None:
            self._log_det[image] = self._log_det.get(image, 0.0) + gradient.double().sum()

    @torch.no_grad()
    def angle(self) -> float:
        learned, true = self._data / 2, self._data
        for image, gradient in self._log_det.items():
            total = gradient.item()
            learned.add_(self._learned_term(image), alpha=total / 2)
            true.add_(self._exact_term(image), alpha=total)
        return degrees(learned, true)

    def _learned_term(self, image: tuple[int, ...]) -> Tensor:
        if isinstance(self.layer, SelfNormLinear):
            return self._inverse.T
        geometry = self.layer.shape.geometry
        return inverse_term(self._inverse, self._weight, torch.Size(image), *geometry)

    def _exact_term(self, image: tuple[int, ...]) -> Tensor:
        """The gradient of log |det|; nan where there is none."""
        if not self._weight.isfinite().all():
            return torch.full_like(self._weight, math.nan)
        weight = self._weight.detach().requires_grad_(True)
        with torch.enable_grad():
            if isinstance(self.layer, SelfNormLinear):
                value = exact.linear_log_abs_det(weight)
            else:
                height, width = image
                geometry = self.layer.shape.geometry
                precision = wide_dtype(self.layer.weight.dtype)
                value = exact.conv2d_log_abs_det(weight, (height, width), *geometry, precision)
        if not value.isfinite():
            return torch.full_like(self._weight, math.nan)
        return torch.autograd.grad(value, weight)[0]
