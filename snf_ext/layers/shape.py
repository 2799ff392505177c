"""Bijections that only move elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bijection import Bijection, FlowStep, per_sample_zeros
from .event import check_events, checked_size


class Flatten(Bijection):
    """Events of ``event_shape`` become vectors: ``(B, *event_shape) -> (B, D)``; log_det is 0.

    Args:
        event_shape: shape of one event, needed to undo it.

    >>> Flatten((1, 2, 2)).inverse(Flatten((1, 2, 2))(torch.zeros(3, 1, 2, 2)).z).shape
    torch.Size([3, 1, 2, 2])
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_events(x, "x", self.event_shape)
        vectors = x.reshape(x.shape[0], math.prod(self.event_shape))
        return FlowStep(vectors, *_two_zeros(x))

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

    >>> Squeeze()(torch.zeros(1, 1, 28, 28)).z.shape
    torch.Size([1, 4, 14, 14])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return FlowStep(_fold(x, "x"), *_two_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return _unfold(z, "z")

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = event_shape
        return (4 * channels, height // 2, width // 2)


class Unsqueeze(Bijection):
    """Trades channels for resolution: ``(B, 4C, H, W) -> (B, C, 2H, 2W)``; undoes :class:`Squeeze`.

    Raises:
        ValueError: x is not ``(B, 4C, H, W)``.

    >>> Unsqueeze()(torch.zeros(1, 4, 14, 14)).z.shape
    torch.Size([1, 1, 28, 28])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return FlowStep(_unfold(x, "x"), *_two_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return _fold(z, "z")

    def output_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = event_shape
        return (channels // 4, 2 * height, 2 * width)


class Permutation(Bijection):
    """A fixed permutation along one dimension: ``z[:, i] = x[:, permutation[i]]``; log_det is 0.

    Shapes: x ``(B, ...)`` with n elements along ``dim``, z the same.

    Args:
        size: n.
        dim: which dimension of the batch, not 0; 1 is that of channels and features.
        permutation: the numbers 0..n-1 in some order; a random one if not given. It is a buffer
            and saved with the state.
        seed: for a random one that does not depend on torch's global state.

    Raises:
        ValueError: ``permutation`` is none of ``size`` elements, ``dim`` is 0, or x has another
            size.

    Source: NNN 10.3.

    >>> Permutation.reverse(3)(torch.tensor([[1.0, 2.0, 3.0]])).z.tolist()
    [[3.0, 2.0, 1.0]]
    """

    permutation: Tensor

    def __init__(
        self,
        size: int,
        dim: int = 1,
        permutation: Sequence[int] | Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.size = checked_size("size", size)
        if dim == 0:
            raise ValueError("dim must not be 0, that of the batch; got 0")
        self.dim = dim
        # On the CPU, whose values are there while layers are made on the meta device.
        if permutation is None:
            generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(size, generator=generator, device="cpu")
        else:
            order = torch.as_tensor(permutation, dtype=torch.int64, device="cpu")
        if order.dim() != 1 or order.sort().values.tolist() != list(range(size)):
            raise ValueError(
                f"permutation must hold each of 0..{size - 1} once; got {order.tolist()}"
            )
        self._start: list[int] = order.tolist()
        self.register_buffer("permutation", torch.empty(size, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the permutation that the layer was made with."""
        self.permutation.copy_(torch.tensor(self._start, device="cpu"))

    @classmethod
    def reverse(cls, size: int, dim: int = 1) -> Permutation:
        """The permutation that turns the order round."""
        return cls(size, dim, range(size - 1, -1, -1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self._check(x, "x")
        return FlowStep(x.index_select(self.dim, self.permutation), *_two_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        self._check(z, "z")
        return z.index_select(self.dim, self.permutation.argsort())

    def _check(self, x: Tensor, name: str) -> None:
        inside = -x.dim() < self.dim < x.dim()
        if not inside or x.shape[self.dim] != self.size:
            raise ValueError(
                f"{name} must have {self.size} elements along dimension {self.dim}; "
                f"got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.size}, dim={self.dim}"


def _two_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    zeros = per_sample_zeros(x)
    return zeros, zeros


def _fold(x: Tensor, name: str) -> Tensor:
    """``(B, C, H, W) -> (B, 4C, H/2, W/2)``."""
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"{name} must have shape [B, C, H, W] with even H and W; got {list(x.shape)}"
        )
    # Not F.pixel_unshuffle: it leaves the shape of an empty batch as it was.
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    return patches.flatten(1, 3)


def _unfold(z: Tensor, name: str) -> Tensor:
    """``(B, 4C, H, W) -> (B, C, 2H, 2W)``."""
    if z.dim() != 4 or z.shape[1] % 4:
        raise ValueError(f"{name} must have shape [B, 4C, H, W]; got {list(z.shape)}")
    patches = z.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
    return patches.flatten(4, 5).flatten(2, 3)
