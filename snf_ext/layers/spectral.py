"""A bound of a convolution's spectral norm that holds for images of every size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bijection import wide_dtype

_FINENESS = 12  # frequencies an axis, for each pixel of the kernel's radius
_SQUARINGS = 4


def spectral_norm_bound(kernel: Tensor) -> Tensor:
    """An upper bound of the norm of ``x -> k * x``, zeros around x, whatever the image's size.

    On an image the convolution is a part of that on the whole plane, whose norm is the largest of
    the norms of the C x C transfer matrices ``K(t) = sum_s k[s] exp(i t s)`` over frequencies t.
    K is a trigonometric polynomial of degree d = k // 2 along each axis; on N equally spaced
    frequencies its largest value is at least ``cos(pi d / N)`` times the true one (Ehlich and
    Zeller 1964). A matrix' norm is bounded by a Schatten norm of high order, from repeated
    squaring: ``|G| <= |G^16|_F^(1/16)`` for ``G = K*K``, at most ``C^(1/32)`` times too large.

    Args:
        kernel: k, ``(C, C', kh, kw)`` with odd kh and kw.

    Returns:
        A scalar in float32 or float64, differentiable, at most ``1.08 C^(1/64)`` times the
        supremum over image sizes; nothing is iterated and nothing waited for.

    Cost: 84 products of 2C x 2C, five times over, for k = 3; backward next to nothing.

    >>> kernel = torch.zeros(1, 1, 3, 3)
    >>> kernel[0, 0, 1] = torch.tensor([1.0, 2.0, 1.0])  # norm 4 on wide images
    >>> 4.0 < spectral_norm_bound(kernel).item() < 4.0 * 1.08
    True
    """
    wide = kernel.to(wide_dtype(kernel.dtype))
    rows, row_loss = _phases(wide, 2, half=False)
    columns, column_loss = _phases(wide, 3, half=True)
    phase = rows[:, None, :, None] + columns[None, :, None, :]  # t s, for each frequency and tap
    real, imaginary = (
        torch.einsum("oiab,mnab->mnoi", wide, part).flatten(0, 1)
        for part in (phase.cos(), phase.sin())
    )
    # As real matrices of twice the size, which have each singular value twice: much faster.
    transfer = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
    # The gradient of a maximum is that of the largest alone: only there is it followed back.
    with torch.no_grad():
        largest = _log_norms(transfer).argmax(0, keepdim=True)
    return _log_norms(transfer[largest]).exp().sum() * (row_loss * column_loss)


def _log_norms(transfer: Tensor) -> Tensor:
    """The logarithm of ``|G^(2^n)|_F^(1/2^(n+1))``, with the scale taken out at each squaring."""
    gram, log_norm = _scaled(transfer.mT @ transfer)
    for n in range(1, _SQUARINGS + 1):
        gram, log_scale = _scaled(gram @ gram)
        log_norm = log_norm + log_scale / 2**n
    return 0.5 * log_norm


def _phases(kernel: Tensor, axis: int, half: bool) -> tuple[Tensor, float]:
    """``t s``, (frequencies, taps), and what is lost between them; K(-t) is conj(K(t))."""
    degree = kernel.shape[axis] // 2
    count = max(1, _FINENESS * degree)
    number = torch.arange(max(count, kernel.shape[axis]), device=kernel.device).to(kernel.dtype)
    angle = number[: count // 2 + 1 if half else count] * (2 * math.pi / count)
    phase = angle[:, None] * (number[: kernel.shape[axis]] - degree)
    return phase, 1 / math.cos(math.pi * degree / count)


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of Frobenius norm 1, counting each singular value once, and the log of the norm."""
    norm = matrices.flatten(1).norm(dim=1) * math.sqrt(0.5)
    norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return matrices / norm[:, None, None], norm.log()
