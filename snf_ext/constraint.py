"""The layers of a flow held to a reconstruction error, each by a controller of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bijection import Bijection, FlowStep
from .controllers import Controller

if TYPE_CHECKING:
    from .flow import Flow


def constrain(flow: Flow, controller: Controller) -> Flow:
    """Give every layer of ``flow`` whose inverse is trained a controller of its own.

    At any depth, in place of any before; each gets a copy of ``controller`` on its own device.
    ``flow.recon_weight`` becomes 1: ``Flow.loss`` sums what the layers give as recon, which in
    training mode is weighted now. Evaluation mode and exact values are as ever.

    Returns:
        ``flow``.

    Raises:
        TypeError: ``controller`` is no :class:`Controller`.
        ValueError: no layer of ``flow`` has an inverse that is trained: one that is tracked has no
            penalty to weigh.

    >>> import snf_ext
    >>> flow = snf_ext.constrain(snf_ext.models.fc((1, 4, 4)), snf_ext.Relative())
    >>> images = torch.randint(256, (8, 1, 4, 4))
    >>> flow.loss(images).backward()
    >>> {name: c.recon_weight.item() < 1 for name, c in controllers(flow).items()}
    {'bijections.4': True, 'bijections.6': True}
    """
    if not isinstance(controller, Controller):
        raise TypeError(f"controller must be a Controller; got {type(controller).__name__}")
    layers: list[Any] = [
        m
        for m in flow.modules()
        if isinstance(m, Bijection) and hasattr(m, "controller") and not _is_tracked(m)
    ]
    if not layers:
        raise ValueError(
            "flow must have a layer whose inverse is trained by the penalty, not tracked; got none"
        )
    for layer in layers:
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        layer.controller = copy.deepcopy(controller).train(layer.training).to(device)
    flow.recon_weight = 1.0
    return flow


def _is_tracked(layer: nn.Module) -> bool:
    """Whether the layer's learned inverse is fitted and no parameter."""
    inverse = getattr(layer, "weight_inv", None)
    return isinstance(inverse, Tensor) and not inverse.requires_grad


def controllers(flow: nn.Module) -> dict[str, Controller]:
    """The controllers in ``flow`` by the names of their layers, in the order of its modules."""
    return {
        name.rpartition(".")[0]: module
        for name, module in flow.named_modules()
        if isinstance(module, Controller)
    }


@contextmanager
def shown_all(flow: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """A block in which lambda stays, after the controllers have seen all parts of a batch.

    For a batch that is taken part by part, whose gradients need the lambda that follows from the
    whole of it. ``run`` passes each part through ``flow`` once, without gradients; where there is
    no controller it is not called.
    """
    held = list(controllers(flow).values())
    try:
        for controller in held:
            controller._found = torch.zeros_like(controller.sums)
        with torch.no_grad():
            if held:
                run()
            for controller in held:
                assert controller._found is not None
                controller._advance(controller._found)
                controller._found, controller._moved = None, True
        yield
    finally:
        for controller in held:
            controller._found, controller._moved = None, False


def weighted(step: FlowStep, controller: Controller | None, x: Tensor) -> FlowStep:
    """``step`` of a layer on ``x``, recon times the controller's lambda if there is one."""
    if controller is None:
        return step
    # Not by _replace: torch 2.11 cannot trace that.
    return FlowStep(step.z, step.log_det, controller(step.recon, x))
