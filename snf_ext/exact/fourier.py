"""Convolutions with circular padding: one small matrix for each spatial frequency."""

from __future__ import annotations

import torch
from torch import Tensor


class FourierLU:
    """The matrix of a circular convolution, diagonalised over space by the Fourier transform.

    At each frequency u it mixes the channels of a group by ``K(u) = sum_t w[t] e^(2 pi i u.t)``, so
    ``log |det T| = sum_u log |det K(u)|``, and a system is solved frequency by frequency.

    Args:
        weight: ``(C, C/groups, kh, kw)`` in float64.
        spatial_shape: ``(H, W)``.
        dilation, groups: as in the convolution.

    Cost: ``H W C (C/groups)^2`` operations and ``H W C (C/groups)`` numbers.

    >>> lu = FourierLU(torch.tensor([[[[0.0, 0.0, 2.0]]]]).double(), (1, 3), 1, 1)
    >>> round(lu.log_abs_det.item(), 4), lu.solve(torch.tensor([[[[2.0, 4.0, 6.0]]]])).tolist()
    (2.0794, [[[[3.0, 1.0, 2.0]]]])
    """

    def __init__(
        self, weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int
    ) -> None:
        weight = weight.detach()
        self._size = spatial_shape
        spectrum = _spectrum(weight, spatial_shape, dilation, groups)
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(spectrum)
        pivots = self._lu.diagonal(dim1=-2, dim2=-1).abs()
        # The transform leaves rounding noise where there should be a 0.
        noise = 4 * torch.finfo(weight.dtype).eps * weight.abs().sum((2, 3))
        noise = noise.unflatten(0, (groups, -1)).amax(1)  # of each input channel
        pivots = torch.where(pivots > noise[:, None], pivots, torch.zeros_like(pivots))
        pivots = torch.where(spectrum.isfinite().all(), pivots, torch.nan)
        self.log_abs_det = _sum_over_frequencies(pivots.log().sum(-1), spatial_shape[1])
        """``log |det T|`` in nats, a scalar; -inf if T is singular."""

    def move(self, device: torch.device) -> None:
        """Solve there from now on."""
        self._lu, self._pivots = self._lu.to(device), self._pivots.to(device)

    def solve(self, rhs: Tensor) -> Tensor:
        """``x`` with ``w * x = rhs`` for each image, ``(B, C, H, W)``; differentiable in rhs."""
        groups, _, channels = self._lu.shape[:3]
        height, width = self._size
        waves = torch.fft.rfft2(rhs.to(self._lu.real.dtype)).reshape(
            rhs.shape[0], groups, channels, self._lu.shape[1]
        )
        solved = torch.linalg.lu_solve(self._lu, self._pivots, waves.permute(1, 3, 2, 0))
        solved = solved.permute(3, 0, 2, 1).reshape(*rhs.shape[:3], width // 2 + 1)
        return torch.fft.irfft2(solved, s=(height, width)).to(rhs.dtype)


def fourier_log_abs_det(
    weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int
) -> Tensor:
    """``log |det T(w)|`` of a circular convolution in nats, a scalar with its exact gradient.

    >>> fourier_log_abs_det(torch.tensor([[[[0.0, 0.0, -1.0]]]]), (1, 3), 1, 1).item()
    0.0
    """
    spectrum = _spectrum(weight, spatial_shape, dilation, groups)
    return _sum_over_frequencies(torch.linalg.slogdet(spectrum).logabsdet, spatial_shape[1])


def _spectrum(weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int) -> Tensor:
    """K of each group and frequency, ``(G, F, c, c)``; half of the plane says all of it."""
    height, width = spatial_shape
    tall, wide = weight.shape[2:]
    rows = (torch.arange(tall) - tall // 2) * dilation % height
    columns = (torch.arange(wide) - wide // 2) * dilation % width
    places = (rows[:, None] * width + columns).flatten().to(weight.device)
    plane = weight.new_zeros(*weight.shape[:2], height * width)
    plane = plane.index_add(2, places, weight.flatten(2))  # taps that meet are added
    waves = torch.fft.rfft2(plane.unflatten(2, (height, width))).conj()
    return waves.flatten(2).unflatten(0, (groups, -1)).permute(0, 3, 1, 2)


def _sum_over_frequencies(values: Tensor, width: int) -> Tensor:
    """Sum of ``(G, F)`` over the whole plane; the mirrored half has the same values."""
    columns = values.unflatten(1, (-1, width // 2 + 1))
    mirrored = columns[:, :, 1 : (width + 1) // 2]
    return columns.sum() + mirrored.sum()
