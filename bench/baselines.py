"""What else the native layers are compared with: the exact gradient, and the bare products.

Each function is stock PyTorch. The merged equations in plain PyTorch are ``snf_ext.reference``; the
public code's manner is in ``composition``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv_products",
    "exact_linear",
    "linear_products",
]


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """z = W x + c and log|det W| differentiated exactly, O(D^3) a step."""
    return F.linear(x, weight, bias), torch.linalg.slogdet(weight)[1].expand(len(x))


def linear_products(
    x: Tensor,
    delta: Tensor,
    error: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The six products that one merged step cannot do without: the bound of a linear layer.

    y = W x, R y, W^T delta, R^T e, delta x^T, e y^T; rows are samples, all shapes (B, D) but the
    last two, (D, D). With ``out`` no memory is allocated.
    """
    b = (None,) * 6 if out is None else out
    y = torch.mm(x, weight.T, out=b[0])
    return (
        y,
        torch.mm(y, weight_inv.T, out=b[1]),
        torch.mm(delta, weight, out=b[2]),
        torch.mm(error, weight_inv, out=b[3]),
        torch.mm(delta.T, x, out=b[4]),
        torch.mm(error.T, y, out=b[5]),
    )


def conv_products(
    x: Tensor, delta: Tensor, error: Tensor, weight: Tensor, weight_inv: Tensor
) -> tuple[Tensor, ...]:
    """The same six of a convolution, by stock PyTorch: not a bound, but the library's price."""
    padding = (weight.shape[-1] // 2,) * 2

    def back(grad: Tensor, inp: Tensor, kernel: Tensor, which: int) -> Tensor:
        mask = tuple(i == which for i in range(3))
        return torch.ops.aten.convolution_backward(
            grad, inp, kernel, None, (1, 1), padding, (1, 1), False, (0, 0), 1, mask
        )[which]

    y = F.conv2d(x, weight, padding=padding)
    return (
        y,
        F.conv2d(y, weight_inv, padding=padding),
        back(delta, x, weight, 0),
        back(error, y, weight_inv, 0),
        back(delta, x, weight, 1),
        back(error, y, weight_inv, 1),
    )
