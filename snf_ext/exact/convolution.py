"""The factorised matrix of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .band_lu import BandLUs, half_bandwidth
from .block_lu import BlockLU
from .fourier import FourierLU
from .memory import in_units, require_memory
from .pieces import Piece, pieces
from .plan import Layout, Plan, layout_of, plan_conv2d

_NARROW, _FEW_GROUPS = 32, 4


class ConvolutionLU:
    """``log |det T(w)|`` and ``T(w)^-1`` of a convolution, from a :class:`Plan`.

    Factorised in float64 on the CPU, where a kernel is a few KB and pivots are looked at; what
    results goes back to the kernel's device, where systems are solved.

    Raises:
        MemoryError: the plan needs more than there is.
    """

    def __init__(
        self,
        weight: Tensor,
        spatial_shape: tuple[int, int],
        dilation: int,
        groups: int,
        circular: bool,
    ) -> None:
        plan = plan_conv2d(tuple(weight.shape), spatial_shape, dilation, groups, circular)
        require_plan(plan, weight, spatial_shape)
        wide = weight.detach().cpu().double()
        self._size, self._channels = spatial_shape, weight.shape[0]
        self._parts: list[_Fourier | _ZeroPadded] = (
            [_Fourier(wide, spatial_shape, dilation, groups)]
            if circular
            else [
                _ZeroPadded(piece, wide, groups)
                for piece in pieces((wide.shape[2], wide.shape[3]), spatial_shape, dilation)
            ]
        )
        total = sum(part.log_abs_det for part in self._parts)
        self._singular = bool(total == -torch.inf)
        self._device = weight.device if weight.device.type != "mps" else torch.device("cpu")
        for part in self._parts:
            part.move(self._device)
        self.log_abs_det = torch.as_tensor(total, device=self._device)

    def solve(self, rhs: Tensor) -> Tensor:
        """``x`` with ``T(w) x = rhs`` for each row of ``rhs``, ``(B, C H W)``."""
        if self._singular:
            raise ValueError("weight is singular: the layer has no inverse")
        if rhs.numel() == 0:
            return rhs.clone()
        images = rhs.to(self._device).reshape(-1, self._channels, *self._size)
        solved = torch.empty_like(images, memory_format=torch.contiguous_format)
        for part in self._parts:
            part.solve(images, solved)
        return solved.reshape(rhs.shape).to(rhs)


class _Fourier:
    def __init__(
        self, weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int
    ) -> None:
        self._lu = FourierLU(weight, spatial_shape, dilation, groups)
        self.log_abs_det = self._lu.log_abs_det

    def move(self, device: torch.device) -> None:
        self._lu.move(device)

    def solve(self, images: Tensor, solved: Tensor) -> None:
        solved[:] = self._lu.solve(images)


class _ZeroPadded:
    """One piece of a zero-padded convolution."""

    def __init__(self, piece: Piece, weight: Tensor, groups: int) -> None:
        self._piece, self._groups = piece, groups
        self._kernels = piece.kernels(weight, groups)
        self._layout = layout_of(tuple(self._kernels.shape), piece.size)
        self._lus: BlockLU | BandLUs | None = None
        self._device = weight.device
        oriented = self._kernels.mT if self._layout.transposed else self._kernels
        if self._layout.blocks > 1 and is_narrow(oriented, self._layout.size):
            lus: BlockLU | BandLUs = BandLUs(oriented, self._layout.size)
        else:
            lus = self._lus = factorize_groups(self._kernels, self._layout)
        self.log_abs_det = piece.copies * lus.log_abs_det.sum()

    def move(self, device: torch.device) -> None:
        self._device = device
        if self._lus is not None:
            self._lus.move(device)

    def solve(self, images: Tensor, solved: Tensor) -> None:
        copies = self._piece.cut(images)
        if self._layout.transposed:
            copies = copies.mT
        # Pixels in raster order, the channel fastest; one column for each copy.
        grouped = copies.unflatten(1, (self._groups, -1)).permute(1, 3, 4, 2, 0)
        wide = grouped.to(torch.float64, memory_format=torch.contiguous_format)
        if self._lus is None:
            self._lus = factorize_groups(self._kernels, self._layout)
            self._lus.move(self._device)
        columns = self._lus.solve(wide.flatten(1, 3)).reshape(grouped.shape)
        copies = columns.permute(4, 0, 3, 1, 2).flatten(1, 2)
        self._piece.paste(solved, copies.mT if self._layout.transposed else copies)


def is_narrow(kernels: Tensor, size: tuple[int, int]) -> bool:
    """Whether LAPACK's band gives the log-determinant alone faster than blocks do.

    Up to a half-bandwidth of 31 LAPACK goes column by column. Wider bands use products in threads
    of its own BLAS, for which a busy machine may make it wait 100 times as long.
    """
    groups, channels, _, tall, wide = kernels.shape
    return groups <= _FEW_GROUPS and half_bandwidth(channels, tall, wide, size) < _NARROW


def factorize_groups(kernels: Tensor, layout: Layout) -> BlockLU | BandLUs:
    """The matrices of all groups: by blocks, or as bands where the blocks' pivots are weak."""
    if layout.transposed:
        kernels = kernels.mT
    lus = BlockLU(kernels, layout.size, layout.rows)
    if not lus.weak.any():
        return lus
    del lus
    return BandLUs(kernels.double(), layout.size)


def require_plan(plan: Plan, weight: Tensor, spatial_shape: tuple[int, int]) -> None:
    """Raise MemoryError if the plan needs more memory than there is."""
    channels, _, tall, wide = weight.shape
    height, width = spatial_shape
    require_memory(
        plan.bytes,
        f"the exact factorisation of a {tall}x{wide} convolution on {channels}x{height}x{width} "
        f"images ({plan.parts})",
        f"dense it would be {in_units(plan.dense_bytes)}. Without exact values there are the "
        "learned inverse, inverse(z, refine=n), and training by the self-normalizing gradient; "
        "groups, a smaller kernel, Squeeze after the layer, or padding_mode='circular' take less",
    )
