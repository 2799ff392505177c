"""A zero-padded convolution as independent small ones without dilation.

Taps that no pixel reaches are cut off. Rows that only a dilated tap joins fall into classes that
know nothing of each other, and so do columns; a kernel of one row leaves every image row alone.
What is left of a 1x1 kernel is single pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kept import kept


class Piece(NamedTuple):
    """Alike copies of a convolution on small images, which are cut out of the large one.

    Attributes:
        rows: image rows of each copy, ``(copies along the rows, h)``.
        columns: image columns of each copy, ``(copies along the columns, w)``.
        radius: taps that the kernel keeps on either side of its centre, along rows and columns.
    """

    rows: Tensor
    columns: Tensor
    radius: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)`` of each copy."""
        return self.rows.shape[1], self.columns.shape[1]

    @property
    def copies(self) -> int:
        return self.rows.shape[0] * self.columns.shape[0]

    def kernels(self, weight: Tensor, groups: int) -> Tensor:
        """The kernel of each group, ``(G, c, c, k, k)``, cropped; differentiable."""
        centre = weight.shape[2] // 2, weight.shape[3] // 2
        (top, left), (up, aside) = centre, self.radius
        cropped = weight[:, :, top - up : top + up + 1, left - aside : left + aside + 1]
        return cropped.unflatten(0, (groups, -1))

    def cut(self, images: Tensor) -> Tensor:
        """The copies of all images: ``(B, C, H, W) -> (B copies, C, h, w)``."""
        if self.size == images.shape[2:]:  # the whole image
            return images
        rows, columns = self.rows[:, None, :, None], self.columns[None, :, None, :]
        copies = images[:, :, rows.to(images.device), columns.to(images.device)]
        return copies.movedim(1, 3).flatten(0, 2)

    def paste(self, images: Tensor, copies: Tensor) -> None:
        """The inverse of :meth:`cut`: puts ``copies`` into their places in ``images``."""
        if self.size == images.shape[2:]:  # the whole image
            images.copy_(copies)
            return
        rows, columns = self.rows[:, None, :, None], self.columns[None, :, None, :]
        parts = copies.unflatten(0, (-1, self.rows.shape[0], self.columns.shape[0]))
        images[:, :, rows.to(images.device), columns.to(images.device)] = parts.movedim(3, 1).to(
            images
        )


@kept
def pieces(
    kernel_size: tuple[int, int], spatial_shape: tuple[int, int], dilation: int
) -> list[Piece]:
    """The independent pieces of a zero-padded convolution on ``(H, W)`` images, at most four.

    >>> [(p.size, p.copies) for p in pieces((3, 3), (5, 4), dilation=2)]
    [((3, 2), 2), ((2, 2), 2)]
    >>> [(p.size, p.copies, p.radius) for p in pieces((1, 3), (5, 4), dilation=1)]
    [((1, 4), 5, (0, 1))]
    """
    along_rows = _classes(kernel_size[0], spatial_shape[0], dilation)
    along_columns = _classes(kernel_size[1], spatial_shape[1], dilation)
    return [
        Piece(
            rows,
            columns,
            (
                min(kernel_size[0] // 2, rows.shape[1] - 1),
                min(kernel_size[1] // 2, columns.shape[1] - 1),
            ),
        )
        for rows in along_rows
        for columns in along_columns
    ]


def _classes(taps: int, extent: int, dilation: int) -> list[Tensor]:
    """Positions along one axis, in classes of equal length: one or two of ``(classes, length)``."""
    step = extent if taps == 1 else min(dilation, extent)
    length, longer = extent // step, extent % step  # divmod does not trace
    classes = torch.arange(step)[:, None] + step * torch.arange(length + 1)
    return [c for c in (classes[:longer], classes[longer:, :length]) if len(c)]
