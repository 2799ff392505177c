"""The flow of a checkpoint, which is no larger than the weights that are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from ..flow import Flow
from . import checkpoint
from .errors import UserError

# Bijections without weights stand between those with some, and are in no state.
MODULES_A_WEIGHT, MODULES = 32, 256
WEIGHTS_A_WEIGHT, WEIGHTS = 2, 64
ELEMENTS_AN_ELEMENT, ELEMENTS = 64, 2**22
NUMBER = 2**20  # no side, width or number of layers of a model is larger


def rebuilt(content: dict[str, Any], path: Path, build: Callable[[dict[str, Any]], Flow]) -> Flow:
    """The flow that ``content`` describes, with its weights.

    A few bytes of settings can ask for any number of layers of any size. So the flow is first built
    without memory, on torch's meta device, and is built in earnest where its weights have the
    names and shapes of those stored. Where parts cannot be built so (zuko's), the numbers in the
    settings are bounded instead.

    Args:
        content: from :func:`checkpoint.load`, of ``path``.
        path: for messages.
        build: makes a flow from the part ``model``.

    Raises:
        UserError: the settings fit no model, or the weights are not this model's.
    """
    state = content["state"]
    try:
        _require_small(content["model"]["settings"], path)
        with _bounded(len(state), path):
            try:
                with torch.device("meta"):
                    sketch: Flow | None = build(content["model"])
            except (NotImplementedError, RuntimeError):  # a value was asked for
                sketch = None
            if sketch is None:
                _require_few(content["model"]["settings"], state, path)
            else:
                _require_shapes(sketch, state, path)
            flow = build(content["model"])
    except UserError:
        raise
    except Exception as error:  # settings that no model was made for
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} must fit the model that it names; {reason}") from error
    checkpoint.load_weights(flow, content, path)
    return flow


def _require_small(settings: dict[str, Any], path: Path) -> None:
    for number in _numbers(settings):
        if number > NUMBER:
            raise UserError(
                f"{path} must fit the model that it names; its numbers go up to {NUMBER}; "
                f"got {number}"
            )


def _require_few(settings: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    """Features times width times layers is about how many elements there are."""
    named = {name: value for name, value in settings.items() if name != "pixel_levels"}
    wanted = math.prod(number for number in _numbers(named) if number > 0)
    stored = sum(value.numel() for value in state.values())
    if wanted > ELEMENTS_AN_ELEMENT * stored + ELEMENTS:
        raise UserError(
            f"{path} must fit the model that it names; that has more elements than the {stored} "
            "that are stored"
        )


def _numbers(settings: dict[str, Any]) -> list[int]:
    """The whole numbers of the settings and of the lists among them."""
    values = list(settings.values())
    values += [part for value in values if isinstance(value, list | tuple) for part in value]
    return [value for value in values if isinstance(value, int)]


def _require_shapes(sketch: nn.Module, state: dict[str, Any], path: Path) -> None:
    for name, wanted in sketch.state_dict().items():
        got = state.get(name)
        if got is None or got.shape != wanted.shape:
            shape = "none" if got is None else tuple(got.shape)
            raise UserError(
                f"{path} must fit the model that it names; "
                f"{name} must have shape {tuple(wanted.shape)}; got {shape}"
            )


@contextmanager
def _bounded(weights: int, path: Path) -> Iterator[None]:
    """Refuse to go on building where there are far more parts than weights are stored."""
    left = {
        "modules": MODULES_A_WEIGHT * weights + MODULES,
        "weights": WEIGHTS_A_WEIGHT * weights + WEIGHTS,
    }

    def count(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, name: str, part: Any) -> None:
            left[kind] -= 1
            if left[kind] < 0:
                raise UserError(
                    f"{path} must fit the model that it names; that has more {kind} than the "
                    f"{weights} stored weights are for"
                )

        return hook

    handles = [
        hooks.register_module_module_registration_hook(count("modules")),
        hooks.register_module_parameter_registration_hook(count("weights")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
