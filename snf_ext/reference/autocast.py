"""The autocast rule of all operators: half precisions are widened to float32.

A residual or a log-determinant that is rounded to bfloat16 is worth whole nats.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Asked once: torch 2.11 cannot trace the question.
_AVAILABLE = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def widened_under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors; where autocast is on, those of half precision as float32."""
    x = tensors[0]
    assert x is not None
    kind = x.device.type
    if not (kind in _AVAILABLE and torch.is_autocast_enabled(kind)):
        return tensors
    half = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which torch's own operators keep their inputs' precision."""
    if device.type in _AVAILABLE and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
