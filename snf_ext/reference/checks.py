"""Argument checks of the operators, in the same words as ``csrc/check.h``."""

from __future__ import annotations

from torch import Tensor


def check_linear(x: Tensor, weight: Tensor, weight_inv: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``snf_linear``."""
    _check_floating(x)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight must be a square matrix [D, D]; got {list(weight.shape)}")
    features = weight.shape[0]
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"x must have shape [..., D] with D = {features}; got {list(x.shape)}")
    if weight_inv.shape != weight.shape:
        raise ValueError(
            f"weight_inv must have shape [D, D] = {list(weight.shape)}; "
            f"got {list(weight_inv.shape)}"
        )
    _check_bias(bias, features, "D")
    _check_alike(x, weight=weight, weight_inv=weight_inv, bias=bias)


def check_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_inv: Tensor,
    bias: Tensor | None,
    dilation: int,
    groups: int,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``snf_conv2d``."""
    _check_floating(x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, C, H, W]; got {list(x.shape)}")
    channels = x.shape[1]
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one pixel; got {list(x.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must divide the channels C = {channels}; got {groups}")
    for name, kernel in (("weight", weight), ("weight_inv", weight_inv)):
        if kernel.dim() != 4 or kernel.shape[0] != channels or kernel.shape[1] * groups != channels:
            raise ValueError(
                f"{name} must have shape [C, C/groups, k, k] = "
                f"[{channels}, {channels // groups}, k, k]; got {list(kernel.shape)}"
            )
        if kernel.shape[2] % 2 == 0 or kernel.shape[3] % 2 == 0:
            raise ValueError(
                f"{name} must have an odd kernel size, so that the shape is kept "
                f"(Squeeze changes the resolution); got {list(kernel.shape)}"
            )
    _check_bias(bias, channels, "C")
    _check_alike(x, weight=weight, weight_inv=weight_inv, bias=bias)


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor; got {x.dtype}")


def _check_bias(bias: Tensor | None, size: int, letter: str) -> None:
    if bias is not None and list(bias.shape) != [size]:
        raise ValueError(f"bias must have shape [{letter}] = [{size}]; got {list(bias.shape)}")


def _check_alike(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {other.dtype}")
        if other.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {other.device}")
