"""Where the weights of linear and convolution layers start."""

from __future__ import annotations

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


def resized(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """``kernel`` cropped or zero-padded about its centre to ``size`` (SNF 30)."""
    rows, columns = ((new - old) // 2 for new, old in zip(size, kernel.shape[2:], strict=True))
    return F.pad(kernel, (columns, columns, rows, rows))
