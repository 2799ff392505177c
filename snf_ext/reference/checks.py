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
    if not 1 <= dilation < 2**31:
        raise ValueError(f"dilation must be in [1, 2^31); got {dilation}")
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


def check_penalty_share(share: float) -> None:
    """Raise ValueError unless the share is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"penalty_share must be in [0, 1]; got {float(share)}")


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


def check_batch(x: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless ``x`` is a floating-point ``(B, ...)``."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape [B, ...]; got {list(x.shape)}")


def check_alpha(alpha: float, low: float | None = None, high: float | None = None) -> None:
    """Raise ValueError unless alpha is in (0, 1], or in [low, high) where these are given."""
    if low is None or high is None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1]; got {alpha}")
    elif not low <= alpha < high:
        raise ValueError(f"alpha must be in [{low:g}, {high:g}); got {alpha}")


def check_rq_spline(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, tail_bound: float
) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``rq_spline``."""
    check_batch(x, "x")
    event = list(x.shape[1:])
    bins = widths.shape[-1] if widths.dim() else 0
    # More bins would leave the smallest sizes no room.
    if not 1 <= bins <= 999:
        raise ValueError(f"widths must have 1 to 999 bins in its last dimension; got {bins}")
    shapes = [[*event, bins], [1, *event, bins], [x.shape[0], *event, bins]]
    if list(widths.shape) not in shapes:
        raise ValueError(
            f"widths must have shape [..., K] with [...] = {event} (shared by the batch) or "
            f"{list(x.shape)} (one set an element); got {list(widths.shape)}"
        )
    if heights.shape != widths.shape:
        raise ValueError(
            f"heights must have the shape of widths, {list(widths.shape)}; "
            f"got {list(heights.shape)}"
        )
    inner = [*widths.shape[:-1], bins - 1]
    if list(derivatives.shape) != inner:
        raise ValueError(
            f"derivatives must have shape [..., K - 1] = {inner}; got {list(derivatives.shape)}"
        )
    if not 1e-30 <= tail_bound <= 1e30:
        raise ValueError(f"tail_bound must be in [1e-30, 1e30]; got {tail_bound}")
    _check_alike(x, widths=widths, heights=heights, derivatives=derivatives)


def check_actnorm(x: Tensor, shift: Tensor, log_scale: Tensor) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``actnorm``."""
    _check_floating(x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, C, ...]; got {list(x.shape)}")
    for name, vector in (("shift", shift), ("log_scale", log_scale)):
        if list(vector.shape) != [x.shape[1]]:
            raise ValueError(
                f"{name} must have shape [C] = [{x.shape[1]}]; got {list(vector.shape)}"
            )
    _check_alike(x, shift=shift, log_scale=log_scale)


def check_affine_coupling(x: Tensor, params: Tensor) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``affine_coupling``."""
    _check_floating(x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, C, ...]; got {list(x.shape)}")
    fits = params.dim() == x.dim() and (
        params.shape[0] == x.shape[0] and params.shape[2:] == x.shape[2:]
    )
    if not fits or params.shape[1] % 2 or not 2 <= params.shape[1] <= 2 * x.shape[1]:
        raise ValueError(
            f"params must have shape [B, 2T, ...] with T from 1 to C, for x of {list(x.shape)}; "
            f"got {list(params.shape)}"
        )
    _check_alike(x, params=params)


def check_image_network(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    log_scale: Tensor,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``image_network``."""
    _check_floating(x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, C, H, W]; got {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one pixel; got {list(x.shape)}")
    for name, letters, weight in (("weight_1", "N, C", weight_1), ("weight_3", "T, N", weight_3)):
        if weight.dim() != 4 or weight.shape[0] < 1:
            raise ValueError(
                f"{name} must have shape [{letters}, 3, 3] with {letters[0]} at least 1; "
                f"got {list(weight.shape)}"
            )
    inputs, hidden, outputs = x.shape[1], weight_1.shape[0], weight_3.shape[0]
    for name, letters, tensor, shape in (
        ("weight_1", "N, C, 3, 3", weight_1, [hidden, inputs, 3, 3]),
        ("bias_1", "N", bias_1, [hidden]),
        ("weight_2", "N, N, 1, 1", weight_2, [hidden, hidden, 1, 1]),
        ("bias_2", "N", bias_2, [hidden]),
        ("weight_3", "T, N, 3, 3", weight_3, [outputs, hidden, 3, 3]),
        ("bias_3", "T", bias_3, [outputs]),
        ("log_scale", "T, 1, 1", log_scale, [outputs, 1, 1]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape [{letters}] = {shape}; got {list(tensor.shape)}"
            )
        _check_alike(x, **{name: tensor})


def check_triangular(z: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless the arguments fit ``triangular_conv2d_solve``."""
    if not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor; got {z.dtype}")
    if z.dim() != 4:
        raise ValueError(f"z must have shape [B, C, H, W]; got {list(z.shape)}")
    channels = z.shape[1]
    if channels < 1 or z.shape[2] < 1 or z.shape[3] < 1:
        raise ValueError(f"z must have at least one channel and pixel; got {list(z.shape)}")
    if weight.dim() != 4 or list(weight.shape[:2]) != [channels] * 2 or min(weight.shape[2:]) < 1:
        raise ValueError(
            f"weight must have shape [C, C, kh, kw] = [{channels}, {channels}, kh, kw]; "
            f"got {list(weight.shape)}"
        )
    if weight.dtype != z.dtype:
        raise TypeError(f"weight must have the dtype of z, {z.dtype}; got {weight.dtype}")
    if weight.device != z.device:
        raise ValueError(f"weight must be on the device of z, {z.device}; got {weight.device}")
