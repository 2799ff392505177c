"""The models of the benchmark: ours, the composition of the same, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import snf_ext

from .cases import ModelCase
from .composed_conv import ComposedConv
from .composed_glow import ComposedGlow
from .composition import ComposedFC, ComposedFlow

__all__ = ["check_agreement", "composed_like", "copy_parameters", "make_flow", "moved"]


def make_flow(case: ModelCase) -> snf_ext.Flow:
    """The package's model of a case; Glow's actnorm has started from a batch."""
    if case.model == "conv":
        return snf_ext.models.conv(case.event_shape, case.layers, case.blocks)
    if case.model == "glow":
        flow = snf_ext.models.glow(case.event_shape, case.blocks, case.steps, case.hidden)
        images = torch.randint(256, (case.batch, *case.event_shape)).float()
        snf_ext.layers.initialize(flow.train(), [images])
        return flow
    return snf_ext.models.fc(case.event_shape, case.layers)


def composed_like(flow: nn.Module, case: ModelCase, base: str = "multivariate") -> ComposedFlow:
    """The composed model of a case, with the flow's numbers, dtype and device."""
    like = next(flow.parameters())
    where = {"base": base, "device": like.device, "dtype": like.dtype}
    composed: ComposedFlow
    if case.model == "conv":
        composed = ComposedConv(case.event_shape, case.layers, case.blocks, **where)
    elif case.model == "glow":
        shape = (case.event_shape, case.blocks, case.steps, case.hidden)
        composed = ComposedGlow(*shape, **where)
    else:
        composed = ComposedFC(case.event_shape, case.layers, **where)
    copy_parameters(flow, composed)
    return composed


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Both hold their parameters in the order of their layers; shapes may differ by ones."""
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.copy_(a.view(b.shape))


@torch.no_grad()
def moved(flow: snf_ext.Flow, dtype: torch.dtype) -> snf_ext.Flow:
    """The flow with its parameters moved away from their start, and in another precision.

    At the start R undoes W almost exactly, and the penalty has no gradient to speak of.
    """
    for p in flow.parameters():
        p.add_(torch.randn_like(p), alpha=0.02 / max(1, p[0].numel()) ** 0.5)
    return flow.to(dtype)


def check_agreement(
    case: ModelCase, backend: str, device: torch.device | str = "cpu", batch: int = 4
) -> float:
    """Compares a backend with the composition on one batch: exact log p, and each gradient.

    In float64 on the CPU, in float32 elsewhere, where the kernels have no other. Pixels are 1..254:
    at the ends the composition's squeeze differs by as much as 2 a^2 / a.

    Returns:
        the largest difference, relative to the largest element of what is compared.

    Raises:
        RuntimeError: the two do not agree.
    """
    is_cpu = torch.device(device).type == "cpu"
    tolerance = 1e-8 if is_cpu else 1e-3
    cpu_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    flow = moved(make_flow(case), torch.float64 if is_cpu else torch.float32).to(device)
    composed = composed_like(flow, case)
    dtype = next(flow.parameters()).dtype
    x = torch.randint(1, 255, (batch, *case.event_shape), device=device).to(dtype)

    with snf_ext.use_backend(backend):
        ours = _values(flow, lambda: flow.loss(x).backward(), x)
    theirs = _values(composed, lambda: composed.training_backward(x), x)
    torch.random.set_rng_state(cpu_state)

    worst = 0.0
    for (name, a), b in zip(ours, theirs, strict=True):
        b = b[1].view(a.shape)
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{backend} and composed differ by {error:.1e} in {name}")
        worst = max(worst, error)
    return worst


def _values(model: nn.Module, backward: Callable[[], None], x: Tensor) -> list[tuple[str, Tensor]]:
    """Exact log p and the gradients of one training step, under the same noise for every model."""
    model.train()
    torch.manual_seed(1)
    found = [("log_prob", model.log_prob(x).detach())]  # type: ignore[operator]
    torch.manual_seed(1)
    backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            raise RuntimeError(f"no gradient of {name}")
        found.append((f"the gradient of {name}", p.grad))
    return found
