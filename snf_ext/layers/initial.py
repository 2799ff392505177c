"""Where the weights of linear and convolution layers start."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def near_identity(shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """Identity (Dirac for a kernel) plus Xavier-normal noise of gain 0.01 (SNF A.3)."""
    if len(shape) == 2:
        identity = torch.eye(shape[0])
    else:
        identity = nn.init.dirac_(torch.empty(shape), groups)
    return identity + nn.init.xavier_normal_(torch.empty(shape), gain=0.01)


def near_orthogonal(shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """A random orthogonal matrix of each group's channels at a kernel's centre.

    The other taps hold Xavier-normal noise of gain 0.01; a 1x1 kernel is orthogonal exactly.
    """
    per_group = shape[1]
    kernel = nn.init.xavier_normal_(torch.empty(shape), gain=0.01)
    centre = kernel[:, :, shape[2] // 2, shape[3] // 2]
    for start in range(0, shape[0], per_group):
        centre[start : start + per_group] = random_orthogonal(per_group)
    return kernel


def random_orthogonal(size: int) -> Tensor:
    """A random orthogonal matrix, uniform over all of them."""
    return nn.init.orthogonal_(torch.empty(size, size))


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # what it draws is drawn, so that a seed means what it meant
        _zero(self)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero(self)


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


STARTS: dict[str, Callable[..., Tensor]] = {
    "identity": near_identity,
    "orthogonal": near_orthogonal,
}


def checked_start(start: str) -> str:
    """``start``, or ValueError unless it is the name of one."""
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}; got {start!r}")
    return start


def resized(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """``kernel`` cropped or zero-padded about its centre to ``size`` (SNF 30)."""
    rows, columns = ((new - old) // 2 for new, old in zip(size, kernel.shape[2:], strict=True))
    return F.pad(kernel, (columns, columns, rows, rows))
