"""The paper's convolutional model and its spline, composed as in its public code.

The spline follows the public code's manner:

- its parameters, one set for each pixel, are repeated to the batch before anything is computed, so
  that softmax, cumulative sum and softplus run for every sample;
- elements inside and outside the interval are picked and put back by boolean masks, whose sizes the
  host has to wait for;
- the smallest and the largest element are compared with the interval on the host;
- the bin is found by comparing with all knots, and its seven numbers by as many gathers;
- the inverse checks on the host that every element has a root.

Left out: the second check behind a failed one, which only prints, and the search of a NaN in it.
As there, a batch with no element inside the interval is an error.

Source: Keller et al. 2021, A.3; Durkan et al. 2019, "Neural Spline Flows", equations 4-8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composition import ComposedConv2d, ComposedFlow

__all__ = ["ComposedConv", "ComposedSpline"]

SMALLEST = 1e-3  # width and height of a bin as shares of the interval; slope
UNIT_SLOPE = math.log(math.expm1(1 - SMALLEST))  # a raw slope of 0 stands for 1


def _knots(raw: Tensor, bound: float) -> Tensor:
    """K + 1 knots on [-bound, bound] from the raw sizes of K bins, whose ends are then set."""
    sizes = SMALLEST + (1 - SMALLEST * raw.shape[-1]) * F.softmax(raw, dim=-1)
    knots = F.pad(torch.cumsum(sizes, dim=-1), (1, 0))
    knots = 2 * bound * knots - bound
    knots[..., 0] = -bound
    knots[..., -1] = bound
    return knots


def _find_bin(knots: Tensor, x: Tensor) -> Tensor:
    """Index of the bin that holds x; the last knot is moved up, so that it holds the bound."""
    knots[..., -1] += 1e-6
    return (torch.sum(x[..., None] >= knots, dim=-1) - 1)[..., None]


Numbers = tuple[Tensor, ...]


def _of_bins(x: Tensor, raw: Numbers, bound: float, inverse: bool = False) -> Numbers:
    """For n elements (n,) with parameters of their own: x0, w, y0, h of the bin, and its slopes.

    The bin is the one that holds x or, for the inverse, y; the slopes are the bin's own, and those
    at its two knots.
    """
    if torch.min(x) < -bound or torch.max(x) > bound:
        raise ValueError(f"x must be inside [-{bound}, {bound}]")

    widths, heights, slopes = raw
    knots_x, knots_y = _knots(widths, bound), _knots(heights, bound)
    widths = knots_x[..., 1:] - knots_x[..., :-1]
    heights = knots_y[..., 1:] - knots_y[..., :-1]
    slopes = SMALLEST + F.softplus(slopes)
    k = _find_bin(knots_y if inverse else knots_x, x)
    tables = (knots_x, widths, knots_y, heights, heights / widths, slopes, slopes[..., 1:])
    return tuple(table.gather(-1, k)[..., 0] for table in tables)


def _inside(x: Tensor, raw: Numbers, bound: float) -> tuple[Tensor, Tensor]:
    """The spline and the log of its slope."""
    x0, w, y0, h, s, d0, d1 = _of_bins(x, raw, bound)
    t = (x - x0) / w
    both = t * (1 - t)
    numerator = h * (s * t.pow(2) + d0 * both)
    denominator = s + (d0 + d1 - 2 * s) * both
    y = y0 + numerator / denominator
    slope = s.pow(2) * (d1 * t.pow(2) + 2 * s * both + d0 * (1 - t).pow(2))
    return y, torch.log(slope) - 2 * torch.log(denominator)


def _inside_inverse(y: Tensor, raw: Numbers, bound: float) -> Tensor:
    """The x of each y: the root in [0, 1] of the quadratic a t^2 + b t + c, in its stable form."""
    x0, w, y0, h, s, d0, d1 = _of_bins(y, raw, bound, inverse=True)
    above, bend = y - y0, d0 + d1 - 2 * s
    a = above * bend + h * (s - d0)
    b = h * d0 - above * bend
    c = -s * above
    discriminant = b.pow(2) - 4 * a * c
    if not (discriminant >= 0).all():
        raise ValueError("y must be a value of the spline")
    return 2 * c / (-b - torch.sqrt(discriminant)) * w + x0


class ComposedSpline(nn.Module):
    """Rational-quadratic spline in the manner of the public code, the identity outside [-T, T].

    ``forward`` maps (B, *event_shape) to (y, log_det), log_det (B,) in nats.
    """

    def __init__(self, event_shape: tuple[int, ...], bins: int = 5, bound: float = 10.0) -> None:
        super().__init__()
        self.bound = bound
        self.widths = nn.Parameter(0.01 * torch.randn(1, *event_shape, bins))
        self.heights = nn.Parameter(0.01 * torch.randn(1, *event_shape, bins))
        self.derivatives = nn.Parameter(0.01 * torch.randn(1, *event_shape, bins - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside, raw = self._raw(x)
        outside = ~inside
        y, log_slope = torch.zeros_like(x), torch.zeros_like(x)
        y[outside] = x[outside]
        log_slope[outside] = 0
        y[inside], log_slope[inside] = _inside(x[inside], raw, self.bound)
        return y, log_slope.flatten(1).sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        inside, raw = self._raw(y)
        outside = ~inside
        x = torch.zeros_like(y)
        x[outside] = y[outside]
        x[inside] = _inside_inverse(y[inside], raw, self.bound)
        return x

    def _raw(self, x: Tensor) -> tuple[Tensor, Numbers]:
        """Which elements are inside the interval, and their raw widths, heights and slopes."""
        repeats = (len(x),) + (1,) * x.dim()
        widths = self.widths.repeat(repeats)
        heights = self.heights.repeat(repeats)
        slopes = F.pad(self.derivatives.repeat(repeats), (1, 1)) + UNIT_SLOPE
        inside = (x >= -self.bound) & (x <= self.bound)
        return inside, (widths[inside, :], heights[inside, :], slopes[inside, :])


class ComposedSqueeze(nn.Module):
    """2x2 patches to channels, copied: (B, C, H, W) to (B, 4C, H/2, W/2)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2)
        x = x.permute(0, 1, 3, 5, 2, 4).contiguous()
        return x.view(batch, 4 * channels, height // 2, width // 2)

    def inverse(self, z: Tensor) -> Tensor:
        batch, channels, height, width = z.shape
        z = z.view(batch, channels // 4, 2, 2, height, width)
        z = z.permute(0, 1, 4, 2, 5, 3).contiguous()
        return z.view(batch, channels // 4, 2 * height, 2 * width)


def _log_abs_det(layer: ComposedConv2d, image: Tensor) -> Tensor:
    """log|det| of a convolution on images like ``image``, by its dense D x D matrix."""
    features = image.numel()
    eye = torch.eye(features, dtype=image.dtype, device=image.device)
    images = eye.view(features, *image.shape)
    matrix = F.conv2d(images, layer.weight, padding=layer.padding).flatten(1)
    return torch.linalg.slogdet(matrix)[1]


class ComposedConv(ComposedFlow):
    """The convolutional flow on images 0..255 in the manner of the public code.

    Blocks of 3x3 convolutions with a squeeze between the blocks, and a spline after each
    convolution but the last; 102,613 parameters with 9 layers in 3 blocks on 1x28x28.
    """

    def __init__(
        self,
        event_shape: tuple[int, int, int] = (1, 28, 28),
        layers: int = 9,
        blocks: int = 3,
        base: str = "multivariate",
        recon_weight: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(math.prod(event_shape), base, recon_weight, device, dtype)
        channels, height, width = event_shape
        modules: list[nn.Module] = []
        for index in range(layers):
            if index and index % (layers // blocks) == 0:
                modules.append(ComposedSqueeze())
                channels, height, width = 4 * channels, height // 2, width // 2
            modules.append(ComposedConv2d(channels, 3))
            if index + 1 < layers:
                modules.append(ComposedSpline((channels, height, width)))
        self.layers = nn.ModuleList(modules)
        self.latent_shape = (channels, height, width)
        self.to(device, dtype)

    def _push(self, x: Tensor, log_det: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            if isinstance(layer, ComposedSpline):
                x, slope = layer(x)
                log_det = log_det + slope
                continue
            if exact and isinstance(layer, ComposedConv2d):
                log_det = log_det + _log_abs_det(layer, x[0])
            x = layer(x)
        return x, log_det

    def _pull(self, z: Tensor) -> Tensor:
        x = z.view(len(z), *self.latent_shape)
        for layer in reversed(self.layers):
            x = layer.inverse(x)
        return x
