"""The gradients of one training step, however its batch is split over processes and over time."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..bijection import FlowStep
from ..constraint import shown_all
from ..flow import Flow
from ..layers import BatchNorm
from ..rerun import noise_of, set_noise
from ..shard import Shard, sharded
from .batches import Batch
from .config import Config
from .errors import UserError
from .evaluate import device_of
from .world import World

# Each process changes its buffers as the others do. The option has another name since torch 2.13.
_SYNC = "forward_sync_buffers"
if _SYNC not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC = "broadcast_buffers"


class Part(NamedTuple):
    """Some samples of a batch, which one process takes at one time.

    Attributes:
        shard: which of them; None for all.
        stop: the end of these.
        weight: of their mean in the batch's.
    """

    shard: Shard | None
    stop: int
    weight: float

    def of(self, x: Tensor | None) -> Tensor | None:
        """Its samples of ``x``."""
        return x if x is None or self.shard is None else x[self.shard.start : self.stop]


def parts_of(total: int, rank: int = 0, size: int = 1, pieces: int = 1) -> list[Part]:
    """What process ``rank`` of ``size`` takes of a batch of ``total``, in ``pieces`` after another.

    Shares lie one after the other, and differ by a sample at most. There are as many pieces for
    each process; of a batch with fewer samples than processes everyone takes all.

    >>> [(part.shard.start, part.stop, part.weight) for part in parts_of(8, 1, 2, pieces=2)]
    [(4, 6, 0.25), (6, 8, 0.25)]
    """
    if total < size or size == pieces == 1:
        return [Part(None, total, 1 / size)]
    pieces = min(pieces, total // size)
    shares = [(total * r // size, total * (r + 1) // size) for r in range(size)]
    parts = []
    for piece in range(pieces):
        beside = tuple(
            (
                start + (stop - start) * piece // pieces,
                start + (stop - start) * (piece + 1) // pieces,
            )
            for start, stop in shares
        )
        start, stop = beside[rank]
        shard = Shard(start, total, beside if size > 1 else (), piece == 0)
        parts.append(Part(shard, stop, (stop - start) / total))
    return parts


class OwnShare(nn.Module):
    """A flow that, of every batch, is shown this process's share."""

    def __init__(self, flow: Flow, world: World) -> None:
        super().__init__()
        self.flow, self.world = flow, world

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        (part,) = parts_of(len(x), self.world.rank, self.world.size)
        with sharded(part.shard):
            return self.flow(part.of(x), part.of(context))


class Gradients:
    """Leaves the gradients of a flow's objective on a batch in its parameters.

    ``gradients(batch)`` is the objective on the whole batch, a float, and whether a flag that can
    be given with the batch is up on some process. With several processes each takes its share of
    the batch and all end with the same gradients; with ``config.accumulate`` a share is taken in so
    many pieces, with the memory of one. Noise, tracked inverses and controllers are those of the
    whole batch: the gradients are the same up to rounding, however the batch is split. (A tracked
    linear layer's inverse is made right on samples of the first piece alone.) Where the objective
    is not finite there are none.

    Cost: with controllers and several pieces one more pass forward, for the weight of the penalty
    follows from the whole batch. For each piece two numbers are summed over the processes and, for
    the last, by DistributedDataParallel the gradients.

    Raises:
        UserError: batches are to be split, and a layer's output depends on the whole of them.
    """

    def __init__(self, flow: Flow, config: Config, world: World) -> None:
        self.flow, self.config, self.world = flow, config, world
        self.device = device_of(flow)
        self.objective: nn.Module = _Objective(flow, config)
        split = world.size > 1 or config.accumulate > 1
        if split and any(isinstance(module, BatchNorm) for module in flow.modules()):
            raise UserError(
                "accumulate and the number of processes must be 1 for a flow with BatchNorm, which "
                f"needs whole batches; got {config.accumulate} and {world.size}"
            )
        if world.size > 1:
            options: dict[str, Any] = {_SYNC: False, "gradient_as_bucket_view": True}
            self.objective = DistributedDataParallel(self.objective, **options)

    def __call__(self, batch: Batch, flag: bool = False) -> tuple[float, bool]:
        world = self.world
        parts = parts_of(len(batch.images), world.rank, world.size, self.config.accumulate)
        if len(parts) == 1:
            return self._backward(batch, parts[0], flag)
        noise, value, raised = noise_of(self.device), 0.0, False

        def forward() -> None:
            for part in parts:
                set_noise(self.device, noise)
                with sharded(part.shard):
                    self.flow(part.of(batch.images), part.of(batch.context))

        with shown_all(self.flow, forward):
            for part in parts:
                set_noise(self.device, noise)
                found, up = self._backward(batch, part, flag, last=part is parts[-1])
                value, raised = value + found, raised or up
                if not math.isfinite(value):
                    break
        return value, raised

    def _backward(
        self, batch: Batch, part: Part, flag: bool, last: bool = True
    ) -> tuple[float, bool]:
        """Add a part's gradients; its share of the objective, and the flag, of all processes."""
        wait = nullcontext() if last or self.world.size == 1 else self.objective.no_sync()  # type: ignore[operator]
        with wait, sharded(part.shard):
            loss = self.objective(part.of(batch.images), part.of(batch.context))
            if part.weight != 1:
                loss = loss * part.weight
            value, up = loss.item(), flag
            if self.world.size > 1:
                both = torch.tensor([value, float(flag)], dtype=torch.float64)
                value, flags = self.world.sum(both).tolist()
                up = flags > 0
            if math.isfinite(value):
                # The processes' gradients are averaged, not summed.
                (loss * self.world.size if self.world.size > 1 else loss).backward()
        return value, up


class _Objective(nn.Module):
    """The objective as a module's output, as DistributedDataParallel wants it."""

    def __init__(self, flow: Flow, config: Config) -> None:
        super().__init__()
        self.flow = flow
        self.settings: dict[str, Any] = {
            "log_det_penalty": config.log_det_penalty,
            "bits_per_dim": config.objective == "bits",
        }

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.loss(x, context, **self.settings)
