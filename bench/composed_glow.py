"""Glow, composed of stock PyTorch operations as in the paper's public code.

It follows the public code's manner, beside what ``composition`` says of its mixing layers:

- actnorm, coupling and split prior are a line of arithmetic each, and each adds up its own
  log-determinant for every sample;
- a split prior's half has a D' x D' normal of its own.

Left out: the start of actnorm from data, which is over before a run is timed.

Source: Keller et al. 2021, A.3; Kingma and Dhariwal 2018, "Glow".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composed_conv import ComposedSqueeze
from .composition import ComposedConv2d, ComposedFlow, base_distribution

__all__ = ["ComposedActNorm", "ComposedCoupling", "ComposedGlow", "ComposedSplitPrior"]


class ComposedActNorm(nn.Module):
    """(B, C, H, W) to (z, log_det): channels shifted and scaled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, channels, height, width = x.shape
        shift = self.shift.view(1, channels, 1, 1)
        log_scale = self.log_scale.view(1, channels, 1, 1)
        log_det = -self.log_scale.sum().expand(len(x)) * height * width
        return (x - shift) * torch.exp(-log_scale), log_det


class _ZeroConv2d(nn.Module):
    """3x3 convolution that starts at zero, its channels scaled by exp(3 logs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(outputs))
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        return y * torch.exp(self.logs * 3).view(1, -1, 1, 1)


class ComposedCoupling(nn.Module):
    """(B, C, H, W) to (z, log_det): one half scaled and shifted by a network of the other."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(self.half, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            _ZeroConv2d(width, 2 * (channels - self.half)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x[:, : self.half], x[:, self.half :]
        h = self.net(first)
        log_scale, shift = 2 * torch.tanh(h[:, ::2] / 2), h[:, 1::2]
        z = torch.cat((first, second * torch.exp(log_scale) + shift), dim=1)
        return z, log_scale.flatten(1).sum(-1)


class ComposedSplitPrior(nn.Module):
    """(B, C, H, W) to the first half of the channels, and the log-density of the other."""

    def __init__(self, channels: int, width: int, base: torch.distributions.Distribution) -> None:
        super().__init__()
        self.coupling = ComposedCoupling(channels, width)
        self.base = base

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.coupling(x)
        first, second = x[:, : self.coupling.half], x[:, self.coupling.half :]
        return first, self.base.log_prob(second.flatten(1)) + log_det


class ComposedGlow(ComposedFlow):
    """Glow on images 0..255 in the manner of the public code; it trains, and draws no samples.

    At each level a squeeze and steps of actnorm, self-normalizing 1x1 convolution and affine
    coupling; a split prior between the levels.
    """

    def __init__(
        self,
        event_shape: tuple[int, int, int] = (1, 28, 28),
        levels: int = 2,
        steps: int = 4,
        width: int = 16,
        base: str = "multivariate",
        recon_weight: float = 100.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        channels, height, columns = event_shape
        modules: list[nn.Module] = []
        for level in range(levels):
            modules.append(ComposedSqueeze())
            channels, height, columns = 4 * channels, height // 2, columns // 2
            for _ in range(steps):
                modules.append(ComposedActNorm(channels))
                modules.append(ComposedConv2d(channels, 1))
                modules.append(ComposedCoupling(channels, width))
            if level + 1 < levels:
                second = channels - channels // 2
                prior = base_distribution(second * height * columns, base, device, dtype)
                modules.append(ComposedSplitPrior(channels, width, prior))
                channels -= second
        super().__init__(channels * height * columns, base, recon_weight, device, dtype)
        self.layers = nn.ModuleList(modules)
        self.to(device, dtype)

    def _push(self, x: Tensor, log_det: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            if isinstance(layer, ComposedSqueeze):
                x = layer(x)
            elif isinstance(layer, ComposedConv2d):
                if exact:
                    pixels = x.shape[2] * x.shape[3]
                    log_det = log_det + pixels * torch.linalg.slogdet(layer.weight[:, :, 0, 0])[1]
                x = layer(x)
            else:
                x, of_layer = layer(x)
                log_det = log_det + of_layer
        return x, log_det
