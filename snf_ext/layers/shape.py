"""Bijections that only move elements."""

from __future__ import annotations

import math

from torch import Tensor

from ..bijection import Bijection, FlowStep, per_sample_zeros


class Flatten(Bijection):
    """Events of ``event_shape`` become vectors: ``(B, *event_shape) -> (B, D)``; log_det is 0.

    Args:
        event_shape: shape of one event, needed to undo it.

    >>> import torch
    >>> Flatten((1, 2, 2)).inverse(Flatten((1, 2, 2))(torch.zeros(3, 1, 2, 2)).z).shape
    torch.Size([3, 1, 2, 2])
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"x must have shape [B, ...] with events {list(self.event_shape)}; "
                f"got {list(x.shape)}"
            )
        zeros = per_sample_zeros(x)
        return FlowStep(x.reshape(x.shape[0], math.prod(self.event_shape)), zeros, zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return z.reshape(z.shape[0], *self.event_shape)

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(event_shape),)

    def extra_repr(self) -> str:
        return f"{self.event_shape}"


class Squeeze(Bijection):
    """Trades resolution for channels: ``(B, C, H, W) -> (B, 4C, H/2, W/2)``; log_det is 0.

    Each 2x2 patch becomes four channels, the patch's position fastest.
    Source: Dinh et al. 2016; SNF A.3.

    Raises:
        ValueError: x is not ``(B, C, H, W)`` with even H and W.

    >>> import torch
    >>> Squeeze()(torch.zeros(1, 1, 28, 28)).z.shape
    torch.Size([1, 4, 14, 14])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x must have shape [B, C, H, W] with even H and W; got {list(x.shape)}"
            )
        zeros = per_sample_zeros(x)
        # Not F.pixel_unshuffle: it leaves the shape of an empty batch as it was.
        patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
        return FlowStep(patches.flatten(1, 3), zeros, zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z must have shape [B, 4C, H, W]; got {list(z.shape)}")
        patches = z.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        return patches.flatten(4, 5).flatten(2, 3)

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = event_shape
        return (4 * channels, height // 2, width // 2)
