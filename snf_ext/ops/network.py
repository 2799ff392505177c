"""Dispatch and fake kernels of the couplings' network on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import build_info, runs_native
from ..reference.checks import check_image_network

# Hidden channels up to which one pass over an image is faster than torch's convolutions (measured).
FUSED_WIDTH = 64


def image_network(x: Tensor, weight_1: Tensor, *others: Tensor) -> Tensor:
    """:func:`snf_ext.reference.image_network`; narrow ones on the CPU on the backend in use."""
    narrow = weight_1.dim() == 4 and weight_1.shape[0] <= FUSED_WIDTH
    if runs_native(x.device) and x.device.type == "cpu" and narrow:
        return torch.ops.snf_ext.image_network(x, weight_1, *others)
    return reference.image_network(x, weight_1, *others)


if build_info()["cpp"]:

    @torch.library.register_fake("snf_ext::image_network")
    def _(x: Tensor, *weights: Tensor) -> Any:
        check_image_network(x, *weights)
        return x.new_empty((x.shape[0], weights[4].shape[0], *x.shape[2:]))

    @torch.library.register_fake("snf_ext::image_network_backward")
    def _(grad_y: Tensor, *tensors_and_mask: Any) -> Any:
        *tensors, mask = tensors_and_mask
        return tuple(
            t.new_empty(t.shape if wanted else (0,))
            for t, wanted in zip(tensors, mask, strict=True)
        )
