"""Results that depend on shapes alone are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

R = TypeVar("R")


def kept(function: Callable[..., R]) -> Callable[..., R]:
    """``function``, which is called once for each set of its (hashable) arguments.

    Not while compiling, whose tensors have no values; and what is made under ``inference_mode``
    would be of no use outside.
    """

    @lru_cache(maxsize=64)
    def made(*args: object, **options: object) -> R:
        with torch.inference_mode(False):
            return function(*args, **options)

    @wraps(function)
    def call(*args: object, **options: object) -> R:
        use = function if torch.compiler.is_compiling() else made
        return use(*args, **options)

    return call
