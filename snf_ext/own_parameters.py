"""Parameters that layers set themselves, also where FSDP2 holds them in shards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class SetsParameters(nn.Module):
    """A module that sets parameters of its own in ``forward``, as what starts from data does.

    ``fully_shard`` swaps the shard of a parameter, a DTensor, for the whole of it before a pass and
    back after it: what the pass wrote into the whole is lost. :meth:`_written` writes it into the
    shards, too.
    """

    _shards: ClassVar[dict[str, Any]] = {}  # each module has its own as soon as it has any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and hasattr(value, "placements"):  # a DTensor
            self.__dict__["_shards"] = {**self._shards, name: value}

    @torch.no_grad()
    def _written(self, **values: Tensor) -> None:
        """Tell that all ranks have set these parameters, this one to these values."""
        if torch.compiler.is_compiling():
            return
        for name, value in values.items():
            shard = self._shards.get(name)
            if shard is None:
                continue
            shard.detach().to_local().copy_(_sharded_like(shard, value).to_local())


@torch.no_grad()
def assign_(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter that may be a shard of one, a DTensor, the value of the whole."""
    is_shard = hasattr(parameter, "placements")
    parameter.copy_(_sharded_like(parameter, value) if is_shard else value)


def _sharded_like(shard: Any, value: Tensor) -> Any:
    """The first rank's value: what ranks set from samples of their own is not the same."""
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(shard.device)
    return distribute_tensor(value, shard.device_mesh, shard.placements)
