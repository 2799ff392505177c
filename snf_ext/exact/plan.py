"""What the exact values of a convolution cost, and which way is cheapest: from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from .kept import kept
from .memory import in_units
from .pieces import pieces

# A model of one core: operations and seconds a step of small operations. Measured.
_RATE = 1e10
_STEP = 6e-5


class Layout(NamedTuple):
    """How the matrix of one piece is cut into blocks.

    Attributes:
        transposed: blocks are of image columns rather than rows.
        size: ``(h, w)`` of the piece, after transposing.
        rows: image rows a block.
        blocks: how many; 1 is a dense matrix.
        operations: multiplications and additions of the elimination, at most.
        bytes: memory of the elimination and of what is kept of it, at most.
    """

    transposed: bool
    size: tuple[int, int]
    rows: int
    blocks: int
    operations: float
    bytes: int

    @property
    def seconds(self) -> float:
        return self.operations / _RATE + self.blocks * _STEP


class Plan(NamedTuple):
    """What the exact log-determinant and inverse of a convolution take.

    Attributes:
        method: ``"blocks"``, ``"dense"`` or ``"fourier"``.
        parts: what is factorised, in words.
        operations: multiplications and additions, at most; with the gradient about 2.2 times those.
        bytes: of memory, at most.
        dense_operations: the same for an LU of the whole matrix.
        dense_bytes: the same.
    """

    method: str
    parts: str
    operations: float
    bytes: int
    dense_operations: float
    dense_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.parts}; {self.operations / 1e9:.2g} Gflop and "
            f"{in_units(self.bytes)} (dense {self.dense_operations / 1e9:.2g} Gflop and "
            f"{in_units(self.dense_bytes)})"
        )


@kept
def plan_conv2d(
    weight_shape: tuple[int, ...],
    spatial_shape: tuple[int, int],
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
) -> Plan:
    """How ``log |det T(w)|`` and ``T(w)^-1`` are computed, and what that takes.

    Args:
        weight_shape: of w, ``(C, C/groups, kh, kw)``.
        spatial_shape: ``(H, W)`` of the image.
        dilation, groups, circular: as in the convolution.

    >>> print(plan_conv2d((3, 3, 3, 3), (64, 64)))
    blocks: 64 blocks of 192 rows; 3 Gflop and 40.1 MB (dense 1.2e+03 Gflop and 1.2 GB)
    """
    height, width = spatial_shape
    channels, per_group = weight_shape[:2]
    rows = channels * height * width
    dense = 2 / 3 * rows**3, 8 * rows**2
    if circular:
        frequencies = height * (width // 2 + 1)
        operations = 4 * groups * frequencies * 2 / 3 * per_group**3
        taken = 3 * 16 * groups * frequencies * per_group**2
        parts = f"{groups * frequencies} matrices of {per_group} rows"
        return Plan("fourier", parts, operations, taken, *dense)
    layouts = [
        layout_of((groups, per_group, per_group, *kernel), piece.size)
        for piece in pieces((weight_shape[2], weight_shape[3]), spatial_shape, dilation)
        for kernel in [(2 * piece.radius[0] + 1, 2 * piece.radius[1] + 1)]
    ]
    largest = max(layouts, key=lambda layout: layout.operations)
    count = groups * sum(layout.blocks for layout in layouts)
    block = largest.rows * largest.size[1] * per_group
    parts = f"{count} block{'s' * (count > 1)} of {block} row{'s' * (block > 1)}"
    method = "blocks" if any(layout.blocks > 1 for layout in layouts) else "dense"
    operations = sum(layout.operations for layout in layouts)
    return Plan(method, parts, operations, sum(layout.bytes for layout in layouts), *dense)


@kept
def layout_of(kernels: tuple[int, ...], size: tuple[int, int]) -> Layout:
    """The cheapest blocks for kernels of shape ``(G, c, c, kh, kw)`` on ``(h, w)`` images."""
    best, *others = layouts(kernels, size)
    for layout in others:  # min with a key does not trace
        best = layout if layout.seconds < best.seconds else best
    return best


def layouts(kernels: tuple[int, ...], size: tuple[int, int]) -> list[Layout]:
    """The blocks that there are to choose from: of ever more rows, or columns, up to all."""
    groups, channels, _, tall, wide = kernels
    found = []
    for transposed in (False, True):
        height, width = size[::-1] if transposed else size
        least = max(1, (wide if transposed else tall) // 2)
        heights = [least * 2**i for i in range(height.bit_length()) if least * 2**i < height]
        found += [
            _layout(transposed, (height, width), rows, width * channels, groups)
            for rows in [*heights, height]
        ]
    return found


def _layout(transposed: bool, size: tuple[int, int], rows: int, row: int, groups: int) -> Layout:
    before = -(-size[0] // rows) - 1
    block, last = rows * row, (size[0] - before * rows) * row
    operations = groups * (before * 20 / 3 * block**3 + 2 / 3 * last**3)
    kept = 2 * before * block**2 + last**2
    blocks = 3 if before else 1  # L, D, U or D alone, and where their elements come from
    passing = blocks * (2 * groups + 1) * block**2
    taken = 8 * (groups * kept + passing)
    return Layout(transposed, size, rows, before + 1, operations, taken)
