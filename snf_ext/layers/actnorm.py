"""Activation normalisation, with its initialisation from data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import func_transforms, ops, passes
from ..bijection import Bijection, FlowStep, per_sample_zeros
from ..own_parameters import SetsParameters
from .event import check_channels, checked_size

EPS = 1e-6
# A variance below this share of the mean square is rounding: the channel is constant.
CONSTANT = 1e-12


class ActNorm(SetsParameters, Bijection):
    """``z = (x - shift) exp(-log_scale)`` for each channel, started from data.

    Over its first M batches in training mode the layer adds up, in float64, each channel's sum
    and sum of squares, and after each of them sets ``shift`` to the mean and ``log_scale`` to
    ``log(std + 1e-6)`` of all elements so far. M = 1 is Glow's initialisation, M > 1 the cumulative
    one of SFM 4.2. Afterwards both are ordinary parameters.

    - Before its first training batch, and in evaluation mode always, the layer only applies what
      it has: a new one is the identity. ``inverse`` never initialises.
    - A channel that was constant so far, to a millionth of its size (one pixel at batch size 1
      is), says nothing about its scale, and gets the scale 1. No scale is below 1e-6.
    - Empty batches are not counted.
    - With ``torch.distributed`` in use the sums are those of all ranks.
    - What has been counted is saved with the state: a loaded layer goes on where it was. A state
      of ``shift`` and ``log_scale`` alone, loaded with ``strict=False``, counts as started.
    - During the first M batches what an optimizer does to ``shift`` and ``log_scale`` is
      overwritten, and a batch needs its backward before the next forward. :func:`initialize` runs
      the M batches before training instead.

    Shapes: x ``(B, C, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        channels: C.
        init_batches: M.

    Parameters: ``shift`` and ``log_scale`` of ``(C,)``, started at 0.

    Raises:
        ValueError: a setting is below 1, or x has other channels.

    Source: Kingma and Dhariwal 2018, "Glow"; SFM 4.2, Algorithm 1 (whose line 6 prints mu for nu).

    >>> layer = ActNorm(2)
    >>> z = layer(3 + 5 * torch.randn(8, 2, 4, 4)).z
    >>> z.mean().abs() < 1e-5, z.std().round(decimals=1).item()
    (tensor(True), 1.0)
    """

    sums: Tensor
    elements: Tensor
    batches_left: Tensor

    def __init__(self, channels: int, init_batches: int = 1) -> None:
        super().__init__()
        self.channels = checked_size("channels", channels)
        self.init_batches = checked_size("init_batches", init_batches)
        self.shift = nn.Parameter(torch.empty(channels))
        self.log_scale = nn.Parameter(torch.empty(channels))
        self.register_buffer("sums", torch.empty(2, channels, dtype=torch.float64))
        self.register_buffer("elements", torch.empty((), dtype=torch.float64))
        self.register_buffer("batches_left", torch.empty((), dtype=torch.int64))
        # Beside the buffer, so that a step need not ask the device.
        self._left = init_batches
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: at the identity, to start from the next batches."""
        self.reset_initialization()

    @property
    def initialized(self) -> bool:
        """Whether all M batches have been seen."""
        return self._left == 0

    @torch.no_grad()
    def reset_initialization(self, init_batches: int | None = None) -> None:
        """Back to the identity, to start from the next ``init_batches`` (default: M) batches."""
        count = self.init_batches if init_batches is None else init_batches
        self._left = checked_size("init_batches", count)
        self.batches_left.fill_(self._left)
        for tensor in (self.sums, self.elements, self.shift, self.log_scale):
            tensor.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_channels(x, "x", self.channels)
        if self.training and self._left > 0 and x.numel() > 0:
            passes.once(self, partial(self._observe, x))
        return FlowStep(*ops.actnorm(x, self.shift, self.log_scale), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        check_channels(z, "z", self.channels)
        return ops.actnorm(z, self.shift, self.log_scale, inverse=True)[0]

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Add one batch to the sums, and set the parameters from all of them."""
        if func_transforms.active():
            raise NotImplementedError(
                f"ActNorm must see its first batches ({self._left} are left) outside the "
                "transforms of torch.func; run a training batch first, or initialize(), or eval()"
            )
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"ActNorm must see its first batches ({self._left} are left) before a CUDA graph "
                "is captured; run more eager steps first, or initialize()"
            )
        wide = x.detach().to(self.sums.device).double()
        others = [d for d in range(x.dim()) if d != 1]
        count = wide.new_full((1,), x.numel() // self.channels)
        found = torch.cat((wide.sum(others), wide.square().sum(others), count))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
        self.sums += found[:-1].view(2, -1)
        self.elements += found[-1]
        self.batches_left -= 1
        self._left -= 1

        mean, mean_square = self.sums / self.elements
        variance = mean_square - mean.square()
        log_scale = torch.log(variance.clamp(min=0).sqrt() + EPS)
        constant = variance <= CONSTANT * mean_square
        log_scale = log_scale.masked_fill(constant, 0.0)
        self.shift.copy_(mean)
        self.log_scale.copy_(log_scale)
        self._written(shift=mean, log_scale=log_scale)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ActNorm:
        # Casting the module moves the sums but must not cost them their digits.
        # Nor are they for a device that has no float64.
        kept = {name: getattr(self, name) for name in ("sums", "elements")}
        self._buffers |= dict.fromkeys(kept)
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = fn(tensor.view(torch.int64))  # as integers, which casts leave alone
            if moved.device.type == "mps":
                self._buffers[name] = tensor.cpu()
                continue
            if moved.dtype != torch.int64:  # but for .type()
                moved = tensor.to(moved.device).view(torch.int64)
            self._buffers[name] = moved.view(torch.float64)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        counted, set_ = prefix + "batches_left" in state_dict, prefix + "shift" in state_dict
        if set_ and not counted:  # somebody else's numbers, which no batch shall overwrite
            self.batches_left.zero_()
        if not self.batches_left.is_meta:
            self._left = int(self.batches_left)

    def extra_repr(self) -> str:
        return f"{self.channels}, init_batches={self.init_batches}"


class _ReachedError(Exception):
    """Ends a pass at the layer whose turn it is."""


@torch.no_grad()
def initialize(
    module: nn.Module, batches: Sequence[Tensor], context: Sequence[Tensor] | None = None
) -> None:
    """Start every :class:`ActNorm` in ``module`` from all ``batches``, before training.

    What a layer sees depends on the layers before it, so they take turns: the batches run up to
    the first layer that has not started, which then starts from all of them; and so on. Parameters
    do not change in between, as in SFM 4.2. This is exact, where one joint pass lets deep layers
    see early batches through half-started ones. Layers that had started before start anew.

    Args:
        module: a :class:`snf_ext.Flow`, a bijection, or anything called with x (and context).
        batches: M batches of x.
        context: M contexts, one for each batch.

    Raises:
        ValueError: no batch, an empty one, another number of contexts, or a layer that is not
            reached.

    Cost: L passes of M batches for L layers, half a flow each on average, without gradients.

    >>> layers = torch.nn.Sequential(torch.nn.Linear(3, 3), ActNorm(3))
    >>> initialize(layers, [torch.randn(5, 3) for _ in range(4)])
    >>> layers[1].initialized
    True
    """
    if not batches or not all(x.numel() for x in batches):
        raise ValueError("batches must hold at least one batch, and none that is empty")
    if context is not None and len(context) != len(batches):
        raise ValueError(
            f"context must have one entry for each of {len(batches)} batches; got {len(context)}"
        )
    layers = [m for m in module.modules() if isinstance(m, ActNorm)]
    for layer in layers:
        layer.reset_initialization(len(batches))

    def turn(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, ActNorm)
        if not layer.initialized:
            layer._observe(args[0])
            raise _ReachedError

    hooks = [layer.register_forward_pre_hook(turn) for layer in layers]
    try:
        for _ in layers:
            for i, x in enumerate(batches):
                try:
                    module(x) if context is None else module(x, context[i])
                except _ReachedError:
                    continue
                raise ValueError("module must pass x through every ActNorm; one was not reached")
    finally:
        for hook in hooks:
            hook.remove()
