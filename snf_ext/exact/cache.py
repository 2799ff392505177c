"""Keeps factorisations until the weight changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .factorization import Factorization


class FactorizationCache:
    """Factorisations of one weight, one for each key (an image size).

    An entry holds while the weight's *content* equals the copy it was made from. Version
    counters would be cheaper but miss writes through ``.data``; a comparison misses nothing and
    costs a read of the weight, far less than any use of the factorisation. The copies are no
    part of a module's state, and neither ``deepcopy`` nor ``pickle`` carries them along.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._weight: Tensor | None = None
        self._entries: dict[Hashable, Factorization] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def get(
        self, weight: Tensor, key: Hashable, factorize: Callable[[], Factorization]
    ) -> Factorization:
        """The entry for ``key``, made by ``factorize`` unless it is there and still true."""
        if not self._is_current(weight):
            self._entries.clear()
            self._weight = weight.detach().clone()
        if key not in self._entries:
            while len(self._entries) >= self._limit:
                self._entries.pop(next(iter(self._entries)))
            self._entries[key] = factorize()
        return self._entries[key]

    def _is_current(self, weight: Tensor) -> bool:
        kept = self._weight
        return (
            kept is not None
            and kept.dtype == weight.dtype
            and kept.device == weight.device
            and torch.equal(kept, weight)
        )

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self._limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]
