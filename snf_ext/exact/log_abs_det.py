"""Log-determinants with their exact gradient, for the layers that are trained by it."""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import conv2d_matrix, is_pointwise, pointwise_matrix


def linear_log_abs_det(weight: Tensor) -> Tensor:
    """``log |det W|`` in nats, a scalar whose gradient is the transposed inverse. Cost O(D^3).

    >>> linear_log_abs_det(torch.tensor([[2.0, 0.0], [0.0, -0.5]])).item()
    0.0
    """
    return torch.linalg.slogdet(weight).logabsdet


def conv2d_log_abs_det(
    weight: Tensor, spatial_shape: tuple[int, int], dilation: int, groups: int, circular: bool
) -> Tensor:
    """``log |det T(w)|`` in nats, a scalar with its exact gradient.

    Cost O((C H W)^3), of a 1x1 kernel O(C^3).
    """
    if is_pointwise(weight):
        height, width = spatial_shape
        return height * width * linear_log_abs_det(pointwise_matrix(weight, groups))
    return linear_log_abs_det(conv2d_matrix(weight, spatial_shape, dilation, groups, circular))
