"""How many operators a step dispatches, those of PyTorch and ours alike.

Counted below autograd, in forward, backward and optimizer: what an operator with an autograd
formula of its own calls is counted, what happens inside its kernel is not. A fused operator is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count"]


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> Counter[str]:
    """Calls ``step`` twice; how often each operator was dispatched the second time, by name.

    The first time allocates what later steps find there, such as the optimizer's moments.

    >>> import torch
    >>> x = torch.ones(3, requires_grad=True)
    >>> count(lambda: x * x)["aten::mul.Tensor"]
    1
    """
    step()
    with _Counting() as mode:
        step()
    return mode.counts
