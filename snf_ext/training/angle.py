"""The angle between the self-normalizing and the exact gradient (SNF Figure 3)."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import exact, ops
from ..bijection import FlowStep, per_sample_sum
from ..flow import Flow
from ..layers import SelfNormConv2d, SelfNormLinear
from .batches import split

# A measurement of a layer is not worth more operations than these: some 10 seconds.
MAX_OPERATIONS = 5e10
# Deep flows keep every activation in float64: these many images at a time.
CHUNK = 50

Learned: TypeAlias = SelfNormLinear | SelfNormConv2d


def gradient_angle(flow: Flow, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
    """Angle between the self-normalizing and the exact gradient of each layer's weight, degrees.

    Both are gradients of ``mean(-log N(z) - log_det)`` with respect to W (no reconstruction
    term), for the same samples and the same noise:

        self-normalizing   1/2 delta x' - 1/2 R'
        exact                  delta x' - W^-T

    (the former without its halves if the inverse is tracked) flattened, and compared by
    ``arccos(u.v / |u||v|)``. A convolution has the same with its kernel
    in place of the matrix. 0 where R is the exact inverse and the two halves agree.

    Args:
        flow: any flow. It is copied in float64; itself, its gradients and caches stay untouched.
        x: raw data ``(B, *event_shape)``.
        context: of each sample, for a conditional flow.

    Returns:
        ``{layer name: degrees}`` in the order of ``flow.named_modules()``, at any depth; empty if
        no layer has a learned inverse. nan where a gradient is zero. Convolutions of
        :func:`too_large` are left out.

    Cost: forward and backward in float64, and each layer's exact gradient: O(D^3) for a linear one,
    what :func:`snf_ext.exact.plan_conv2d` says for a convolution.
    Source: SNF section 5.3 and Figure 3.

    >>> import snf_ext
    >>> layer = snf_ext.SelfNormLinear(3)
    >>> flow = snf_ext.Flow([layer], event_shape=(3,))
    >>> sorted(gradient_angle(flow, torch.randn(16, 3)))
    ['bijections.0']
    """
    layers = measured(flow)
    if not layers:
        return {}
    flow = copy.deepcopy(flow).double().train().requires_grad_(True)
    flow.reversible = None  # whose first pass has no graph to take log_dets from
    layers = measured(flow)
    weights = [layer.weight for layer in layers.values()]
    surrogates: list[Tensor] = []
    inputs: dict[nn.Module, torch.Size] = {}

    def set_aside(module: nn.Module, args: tuple[Any, ...], step: FlowStep) -> FlowStep:
        surrogates.append(per_sample_sum(step.log_det).mean())
        inputs[module] = args[0].shape
        return step._replace(log_det=step.log_det.detach())

    for layer in layers.values():
        layer.controller = None  # whose sums over ranks wait for all of them
        layer.register_forward_hook(set_aside)
    shares = [layer.gradient_share for layer in layers.values()]
    share_of_data = [torch.zeros_like(weight) for weight in weights]
    learned: tuple[Tensor, ...] = ()
    with torch.enable_grad():
        for images, c in split(x.double(), None if context is None else context.double(), CHUNK):
            surrogates.clear()
            z, log_det, _ = flow(images, c)
            data_term = -(ops.normal_log_prob(z) + log_det).sum() / len(x)
            first = not learned
            parts = torch.autograd.grad(data_term, weights, retain_graph=first)
            for total, part in zip(share_of_data, parts, strict=True):
                total += part
            if first:  # the same for any samples
                learned = torch.autograd.grad(-torch.stack(surrogates).sum(), weights)
        inverse = [_log_det_gradient(layer, inputs[layer]) for layer in layers.values()]
    return {
        name: degrees(data + learned_term, data / share - true)
        for name, share, data, learned_term, true in zip(
            layers, shares, share_of_data, learned, inverse, strict=True
        )
    }


def measured(flow: Flow) -> dict[str, Learned]:
    """The layers, by name, whose angle :func:`gradient_angle` measures."""
    large = too_large(flow)
    return {
        name: module
        for name, module in flow.named_modules()
        if isinstance(module, Learned) and name not in large
    }


def too_large(flow: Flow) -> dict[str, exact.Plan]:
    """Convolutions whose exact log-determinant takes over 50 Gflop, by name."""
    return {
        name: plan
        for name, plan in flow.exact_plans().items()
        if isinstance(flow.get_submodule(name), SelfNormConv2d) and plan.operations > MAX_OPERATIONS
    }


def left_out(flow: Flow) -> str | None:
    """One line on the layers whose angle is not measured, None if there are none."""
    large = too_large(flow)
    if not large:
        return None
    return (
        f"no gradient angle for {len(large)} convolutions: their exact log-determinants take up to "
        f"{max(plan.operations for plan in large.values()) / 1e9:.2g} Gflop each, more than "
        f"{MAX_OPERATIONS / 1e9:.2g}"
    )


def _log_det_gradient(layer: Learned, size: torch.Size) -> Tensor:
    """The exact gradient of ``log |det|`` of the layer's matrix with respect to its weight."""
    weight = layer.weight.detach().requires_grad_(True)
    if isinstance(layer, SelfNormLinear):
        # Leading dimensions between batch and features apply the matrix once each.
        value = math.prod(size[1:-1]) * exact.linear_log_abs_det(weight)
    else:
        value = exact.conv2d_log_abs_det(weight, (size[2], size[3]), *layer.shape.geometry)
    return torch.autograd.grad(value, weight)[0]


def degrees(u: Tensor, v: Tensor) -> float:
    """The angle between two tensors of one shape, nan if one is zero or not finite.

    By half-angle tangents: near 0, an arccos in float64 stops at 1e-6 degrees.

    >>> round(degrees(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 4)
    45.0
    """
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2((u - v).norm().item(), (u + v).norm().item()))


def mean_angle(angles: dict[str, float]) -> float | None:
    """Average over layers, as in Figure 3; None without layers.

    >>> mean_angle({"a": 1.0, "b": 3.0}), mean_angle({})
    (2.0, None)
    """
    return sum(angles.values()) / len(angles) if angles else None
