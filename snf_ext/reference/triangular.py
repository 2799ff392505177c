"""Masked convolutions whose matrix is triangular, and their solution by substitution.

A kernel of size ``(C, C, kh, kw)`` covers one quadrant. Lower: tap ``(a, b)`` is at the offset
``(a - kh + 1, b - kw + 1)``, so that a pixel depends on those above and to its left and, through
the lower triangle of the last tap, on its own channels up to each. Upper, the mirror image: tap
``(a, b)`` is at ``(a, b)``, and of the first tap the upper triangle counts. With pixels in raster
order and the channel fastest the matrix is lower or upper triangular.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..bijection import wide_dtype
from .checks import check_triangular


def triangular_mask(weight: Tensor, upper: bool) -> Tensor:
    """``weight`` with zeros where the layer's matrix would not be triangular."""
    mask = torch.ones_like(weight)
    own = anchor(mask, upper)
    own.copy_(own.triu() if upper else own.tril())
    return weight * mask


def anchor(weight: Tensor, upper: bool) -> Tensor:
    """The tap that a pixel applies to itself, ``(C, C)``, a view."""
    return weight[:, :, 0, 0] if upper else weight[:, :, -1, -1]


def triangular_conv2d(x: Tensor, weight: Tensor, upper: bool = False) -> Tensor:
    """``w * x`` of the size of x, zeros around it; weight as :func:`triangular_mask` leaves it."""
    return F.conv2d(_pad(x, weight, upper), weight)


def _pad(x: Tensor, weight: Tensor, upper: bool) -> Tensor:
    rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
    return F.pad(x, (0, columns, 0, rows) if upper else (columns, 0, rows, 0))


def triangular_conv2d_solve(z: Tensor, weight: Tensor, upper: bool = False) -> Tensor:
    """``x`` with ``w * x = z``, by substitution pixel after pixel.

    Args:
        z: ``(B, C, H, W)``.
        weight: w, ``(C, C, kh, kw)``, a quadrant as the module's text says; the other triangle of
            the pixel's own tap is not read.
        upper: which of the two triangles and orders.

    Returns:
        x, the shape and dtype of z; half precisions are computed in float32. A zero on the
        diagonal gives infinities and NaN. Gradients flow to z and to the part of w that is read.

    Raises:
        TypeError, ValueError: arguments of other shapes, dtypes or devices.

    Cost: as the convolution, but H + W - 1 steps follow each other.

    >>> z = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    >>> triangular_conv2d_solve(z, torch.tensor([[[[0.5, 1.0]]]]))
    tensor([[[[1.0000, 1.5000, 3.2500]]]])
    """
    check_triangular(z, weight)
    wide = wide_dtype(z.dtype)
    z_, w = z.to(wide), weight.to(wide)
    # Upper is lower with pixels, taps and channels all in reverse order.
    if upper:
        return _solve_lower(z_.flip(1, 2, 3), w.flip(0, 1, 2, 3)).flip(1, 2, 3).to(z.dtype)
    return _solve_lower(z_, w).to(z.dtype)


def _solve_lower(z: Tensor, w: Tensor) -> Tensor:
    (height, width), (rows, columns) = z.shape[2:], w.shape[2:]
    solved: dict[tuple[int, int], Tensor] = {}
    for h in range(height):
        for c in range(width):
            rest = z[:, :, h, c]
            for a in range(rows):
                for b in range(columns):
                    before = solved.get((h + a - rows + 1, c + b - columns + 1))
                    if before is not None:
                        rest = rest - before @ w[:, :, a, b].T
            own = w[:, :, -1, -1]
            solved[h, c] = torch.linalg.solve_triangular(own, rest.T, upper=False).T
    return torch.stack(list(solved.values()), -1).reshape(z.shape)


def solve_weight_gradient(grad_z: Tensor, x: Tensor, weight: Tensor, upper: bool) -> Tensor:
    """Gradient in w of the solution x, where ``grad_z`` is that in z: minus that of ``w * x``."""
    wide = wide_dtype(x.dtype)
    outer = conv2d_weight(_pad(x.to(wide), weight, upper), weight.shape, grad_z.to(wide))
    return -triangular_mask(outer, upper).to(weight.dtype)
