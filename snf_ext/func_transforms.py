"""The transforms of ``torch.func`` (vmap, grad, jvp, ...): whether one is at work, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch.autograd import Function

_F = TypeVar("_F", bound=Function)


def active() -> bool:
    """Whether a transform of ``torch.func`` surrounds this code; traced, as when it was traced.

    >>> active(), torch.vmap(lambda x: x + active())(torch.zeros(2)).tolist()
    (False, [1.0, 1.0])
    """
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def once_differentiable(words: str) -> Callable[[type[_F]], type[_F]]:
    """For functions that are gradients and have none: asked for one, they raise ``words``.

    They have a ``forward`` without a context, and are called by :func:`run`.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(words)

    def decorate(function: type[_F]) -> type[_F]:
        made: Any = function
        made.backward = staticmethod(refuse)
        made.setup_context = staticmethod(lambda ctx, inputs, output: None)
        made.generate_vmap_rule = True
        made.forward_mode = words
        return function

    return decorate


def run(function: Any, *arguments: Any) -> Any:
    """``function.apply``, which refuses forward mode by ``function.forward_mode``.

    Elsewhere than inside transforms torch does that by itself, and ``torch.compile`` takes no
    function that has a forward mode.
    """
    if active() and not torch.compiler.is_compiling():
        function = _refusing(function)
    return function.apply(*arguments)


@cache
def _refusing(function: Any) -> Any:
    class Refusing(function):
        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(function.forward_mode)

    return Refusing
