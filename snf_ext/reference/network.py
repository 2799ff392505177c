"""The network of a coupling on images in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .autocast import widened_under_autocast
from .checks import check_image_network


def image_network(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    log_scale: Tensor,
) -> Tensor:
    """Conv 3x3 - ReLU - conv 1x1 - ReLU - conv 3x3, times ``exp(3 log_scale)``; zero padding.

    Shapes: x ``(B, C, H, W)``, the weights ``(N, C, 3, 3)``, ``(N, N, 1, 1)``, ``(T, N, 3, 3)``,
    the biases ``(N,)``, ``(N,)``, ``(T,)``, log_scale ``(T, 1, 1)``; the result ``(B, T, H, W)``.

    Source: Kingma and Dhariwal 2018, "Glow", section 3.3 and its code.

    >>> import torch
    >>> ones = [torch.ones(s) for s in ((2, 1, 3, 3), (2, 2, 1, 1), (3, 2, 3, 3))]
    >>> zeros = [torch.zeros(s) for s in ((2,), (2,), (3,), (3, 1, 1))]
    >>> arguments = [t for pair in zip(ones, zeros) for t in pair]
    >>> image_network(torch.ones(1, 1, 1, 1), *arguments, zeros[-1]).flatten()
    tensor([4., 4., 4.])
    """
    # Under autocast x may be narrow beside its parameters; the products then narrow all of them.
    tensors = widened_under_autocast(
        x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, log_scale
    )
    check_image_network(*tensors)
    x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, log_scale = tensors
    h = F.relu(F.conv2d(x, weight_1, bias_1, padding=1))
    h = F.relu(F.conv2d(h, weight_2, bias_2))
    # The kernel is scaled rather than the output, which autograd would have to keep.
    scale = (3 * log_scale).exp()
    return F.conv2d(h, weight_3 * scale[..., None], bias_3 * scale.flatten(), padding=1)
