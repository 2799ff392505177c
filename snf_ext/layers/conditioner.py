"""The networks inside couplings: from what passes to the parameters of what is changed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .initial import ZeroConv2d, ZeroLinear


class ScaledConv2d(nn.Module):
    """A 3x3 convolution that starts at zero, its output times ``exp(3 s)`` with a learned s.

    Source: Kingma and Dhariwal 2018, "Glow", section 3.3 and its code.

    >>> ScaledConv2d(2, 4)(torch.randn(1, 2, 3, 3)).abs().max().item()
    0.0
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ZeroConv2d(inputs, outputs, 3, padding=1)
        self.logs = nn.Parameter(torch.empty(outputs, 1, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: s = 0."""
        self.logs.zero_()

    def forward(self, x: Tensor) -> Tensor:
        # The kernel is scaled rather than the output, which autograd would have to keep for s.
        assert self.conv.bias is not None
        scale = (3 * self.logs).exp()
        weight, bias = self.conv.weight * scale[..., None], self.conv.bias * scale.flatten()
        return F.conv2d(x, weight, bias, padding=1)


class ImageNetwork(nn.Sequential):
    """Conv 3x3 - ReLU - conv 1x1 - ReLU - conv 3x3; gives zeros at first.

    A sequence of these modules, whose tensors one operator takes. Where a module has been replaced,
    parametrised or given hooks, they are called one after the other.

    >>> ImageNetwork(2, 4, width=8)(torch.randn(1, 2, 5, 6)).shape
    torch.Size([1, 4, 5, 6])
    """

    KINDS = (nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, ScaledConv2d)

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            ScaledConv2d(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        if not self._is_as_made(layers):
            return super().forward(x)
        first, _, middle, _, last = layers
        return ops.image_network(
            x,
            first.weight,
            first.bias,
            middle.weight,
            middle.bias,
            last.conv.weight,
            last.conv.bias,
            last.logs,
        )

    def _is_as_made(self, layers: list[Any]) -> bool:
        if tuple(map(type, layers)) != self.KINDS:
            return False
        inside = [*layers, layers[-1].conv]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return type(inside[-1]) is ZeroConv2d and not any(
            getattr(module, kind) for module in inside for kind in hooks
        )


def vector_network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Linear - ReLU - linear - ReLU - linear; gives zeros at first."""
    last = ZeroLinear(width, outputs)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last
    )
