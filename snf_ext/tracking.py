"""Learned inverses that are not trained but kept: fitted to the weight after each of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .bijection import wide_dtype
from .reference.autocast import without_autocast


@torch.no_grad()
def fit_inverse_(weight_inv: Tensor, weight: Tensor) -> None:
    """Set R to the inverse of W, in place; where W is singular, leave it.

    Shapes: both ``(D, D)``. Cost: O(D^3), without a wait for the device.

    >>> r = torch.eye(2)
    >>> fit_inverse_(r, torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> r.tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    inverse, info = torch.linalg.inv_ex(weight.to(wide_dtype(weight.dtype)))
    weight_inv.copy_(torch.where(info == 0, inverse.to(weight_inv.dtype), weight_inv))


@torch.no_grad()
def project_inverse_(weight_inv: Tensor, weight: Tensor, x: Tensor) -> None:
    """Change R as little as possible so that it undoes W on some samples x, in place.

    Samples that are not finite change nothing.

        R <- R + (X' - R Y') (Y Y')^-1 Y        with Y = X W'

    the smallest change (in Frobenius norm) after which ``R W x = x`` for each row x of X. On random
    directions this is a method to find the inverse of a matrix; the samples of a flow follow those
    of its singular values that training moves, as it is they that move them.

    Shapes: weight, weight_inv ``(D, D)``; x ``(P, D)``.

    Cost: 3 products of P D^2, and O(P^2 (D + P)). Source: Gower and Richtarik 2017, "Randomized
    quasi-Newton updates are linearly convergent matrix inversion algorithms".

    >>> w, r = torch.tensor([[2.0, 0.0], [1.0, 4.0]]), torch.eye(2)
    >>> project_inverse_(r, w, torch.eye(2))  # on all directions: the inverse
    >>> torch.allclose(r @ w, torch.eye(2), atol=1e-5)
    True
    """
    wide = wide_dtype(weight.dtype)
    with without_autocast(weight.device):
        x, r = x.to(wide), weight_inv.to(wide)  # r is R itself, but for half precision
        y = x @ weight.to(wide).T
        missing = torch.addmm(x, y, r.T, alpha=-1)
        change = _solved(y @ y.T, missing)
        sound = change.isfinite().all() & y.isfinite().all()
        r.addmm_(torch.where(sound, change, 0).T, torch.where(sound, y, 0))
    if r.dtype != weight_inv.dtype:
        weight_inv.copy_(r)


@torch.no_grad()
def fit_when_due_(
    weight_inv: Tensor,
    weight: Tensor,
    due: Tensor,
    every: int,
    image: Sequence[int] = (),
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
) -> None:
    """Count one training step, and fit R to W if that is due, both in place.

    Args:
        weight_inv, weight: R and W, matrices or kernels.
        due: steps until the next fit, counted down, and from 0 back to ``every``; on the CPU.
        every: steps between fits.
        image: ``(H, W)`` for kernels.
        dilation, groups, circular: of kernels.

    >>> w, r, due = torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.tensor(0)
    >>> fit_when_due_(r, w, due, every=3)
    >>> r.item(), due.item()
    (0.25, 2)
    """
    step = _fit_operator if torch.compiler.is_compiling() else _fit
    step(weight_inv, weight, due, every, list(image), dilation, groups, circular)


def _fit(
    weight_inv: Tensor,
    weight: Tensor,
    due: Tensor,
    every: int,
    image: list[int],
    dilation: int,
    groups: int,
    circular: bool,
) -> None:
    left = int(due)
    due.fill_((left or every) - 1)
    if left:
        return
    if image:
        size = (weight_inv.shape[2], weight_inv.shape[3])
        weight_inv.copy_(
            least_squares_kernel(weight, size, (image[0], image[1]), dilation, groups, circular)
        )
    else:
        fit_inverse_(weight_inv, weight)


# For tracing, which cannot see when a fit is due.
_fit_operator = torch.library.custom_op(
    "snf_ext::fit_when_due_", _fit, mutates_args=("weight_inv", "due")
)


@torch.no_grad()
def least_squares_kernel(
    weight: Tensor,
    kernel_size: tuple[int, int],
    spatial_shape: tuple[int, int],
    dilation: int = 1,
    groups: int = 1,
    circular: bool = False,
) -> Tensor:
    """The kernel r of a given size whose convolution comes closest to undoing that of w.

        min over r of  || T(r) T(w) - I ||_F^2

    on images of one size, the borders included: the mean of ``||r * (w * v) - v||^2`` over white
    noise v, in closed form and without noise. One normal matrix a group, of the taps of r.

    Args:
        weight: w, ``(C, C/groups, k, k)``.
        kernel_size: of r, both odd.
        spatial_shape: ``(H, W)`` of the images.
        dilation, groups, circular: of both kernels, as in ``snf_conv2d``.

    Returns:
        r, ``(C, C/groups, *kernel_size)``, computed in float64 and given in the dtype of w.

    Cost: a Cholesky factorisation of order ``C/groups`` times the taps of r, in each group, and
    products of ``(C/groups)^2`` columns with tables of the taps; nothing depends on H and W.
    Source: our own; the least squares that SNF A.4 leaves to gradient descent.

    >>> w = torch.zeros(1, 1, 3, 3)
    >>> w[0, 0, 1, 1] = 2.0
    >>> least_squares_kernel(w, (1, 1), (8, 8)).item()
    0.5
    """
    wide = (weight.cpu() if weight.device.type == "mps" else weight).double()
    taps = wide.unflatten(0, (groups, -1))  # group, channel, channel, rows, columns
    rows, columns = (
        _tables(r, w, extent, dilation, circular, wide.device)
        for r, w, extent in zip(kernel_size, weight.shape[2:], spatial_shape, strict=True)
    )
    wanted = rows.back @ taps @ columns.back.T
    wanted = wanted.permute(0, 1, 3, 4, 2).flatten(1, 3)  # group, (channel, tap), channel
    found = _solved(_gram(taps, rows.meet, columns.meet, kernel_size), wanted)
    return found.mT.reshape(*weight.shape[:2], *kernel_size).to(weight)


def _solved(gram: Tensor, wanted: Tensor) -> Tensor:
    """The solution of normal equations, ``(..., n, n)``; finite for singular ones, too.

    The diagonal is raised by what rounding may have taken from it, as a singular matrix would fail;
    the factorisation is the one that does not ask for failure, because that waits for the device.
    """
    diagonal, precision = gram.diagonal(dim1=-2, dim2=-1), torch.finfo(gram.dtype)
    rounding = 10 * gram.shape[-1] * precision.eps * diagonal.mean(-1, keepdim=True)
    diagonal.add_(rounding.clamp(min=precision.tiny))
    return torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(gram).L)


def _gram(taps: Tensor, rows: Tensor, columns: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inner products of the rows of T(w) that the taps of r read, summed over the pixels.

    Of each group a square matrix of order ``C/groups k'h k'w``, from the products of the taps of w
    and from how often two paths, by taps a, b and by a', b', end at one pixel: a table an axis.
    """
    groups, per_group, _, height, width = taps.shape
    # Few large products, at the price of copies between them: calls are the cost of small kernels.
    read = taps.transpose(1, 2).flatten(2)
    products = (read.mT @ read).view(groups, *(per_group, height, width) * 2)
    found = products.permute(0, 2, 5, 3, 6, 1, 4).reshape(groups, height**2, -1)
    found = (rows @ found).view(groups, len(rows), width**2, -1)
    axes = [size for size in kernel_size for _ in range(2)]
    found = (columns @ found).view(groups, *axes, per_group, per_group)
    order = per_group * kernel_size[0] * kernel_size[1]
    return found.permute(0, 5, 1, 3, 6, 2, 4).reshape(groups, order, order)


class _Tables(NamedTuple):
    """Along one axis, from how many pixels a path goes by a tap a of r and then a tap b of w ...

    A path has to stay within the image unless that is circular.
    """

    meet: Tensor  # ... to the same pixel as one by a' and b': (a, a') by (b, b')
    back: Tensor  # ... to where it began: a by b


@lru_cache(maxsize=64)
def _tables(
    inverse: int, forward: int, extent: int, dilation: int, circular: bool, device: torch.device
) -> _Tables:
    a = (torch.arange(inverse) - inverse // 2) * dilation
    b = (torch.arange(forward) - forward // 2) * dilation
    end = a[:, None] + b
    apart = end[:, None, :, None] - end[None, :, None, :]  # a, a', b, b'
    if circular:
        meet = extent * (apart % extent == 0).double()
        back = extent * (end % extent == 0).double()
    else:
        pixel = torch.arange(extent)[:, None, None]
        first, last = pixel + a[:, None], pixel + end
        stays = ((first >= 0) & (first < extent) & (last >= 0) & (last < extent)).double()
        meet = torch.einsum("pab,pAB->aAbB", stays, stays) * (apart == 0)
        back = stays.sum(0) * (end == 0)
    return _Tables(meet.reshape(inverse**2, forward**2).to(device), back.to(device))
