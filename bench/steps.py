"""Builds the variants of each case: the same step on the same numbers, done in different ways.

A layer's step is forward, loss and backward through autograd, the gradient of x included:
loss = mean_b(|z_b|^2 / 2 - log_det_b + recon_b), a standard normal base and recon_weight 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import snf_ext

from . import baselines
from .cases import ConvCase, LinearCase, ModelCase
from .composition import ComposedConv2d, ComposedFC, ComposedLinear, composed_backward
from .timing import Variant, product_step

__all__ = [
    "conv_variants",
    "linear_variants",
    "model_variants",
    "native_is_built",
]

# The dense matrix of a convolution is only worth factorising, and timing, up to this size.
EXACT_CONV_FEATURES = 1024


def native_is_built() -> bool:
    """Whether the native backend can be timed here."""
    return bool(snf_ext.build_info()["cpp"])


def _backend(name: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    return lambda: snf_ext.use_backend(name)


def _layer_loss(z: Tensor, log_det: Tensor | float = 0.0, recon: Tensor | float = 0.0) -> Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - log_det + recon).mean()


def _variant(
    name: str,
    run: Callable[[], None],
    leaves: tuple[Tensor, ...],
    backend: str | None = None,
    comparable: bool = True,
) -> Variant:
    """A step that starts from empty gradients, as after optimizer.zero_grad()."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        run()

    context = contextlib.nullcontext if backend is None else _backend(backend)
    return Variant(name, step, context, leaves if comparable else ())


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def _operator(
    name: str, function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> Variant:
    """A step through a function of (x, weight, weight_inv, bias)."""
    leaves = _leaves(*tensors)
    return _variant(name, lambda: _layer_loss(*function(*leaves)).backward(), leaves)


def _module(
    name: str, layer: nn.Module, tensors: tuple[Tensor, ...], backend: str | None = None
) -> Variant:
    """A step through a self-normalizing layer of the package."""
    x, *values = tensors
    parameters = (layer.weight, layer.weight_inv, layer.bias)
    _set(parameters, values)
    layer.to(x.device)
    (x,) = _leaves(x)
    return _variant(name, lambda: _layer_loss(*layer(x)).backward(), (x, *parameters), backend)


def _composed(layer: ComposedConv2d, tensors: tuple[Tensor, ...]) -> Variant:
    x, *values = tensors
    parameters = (layer.weight, layer.weight_inv, layer.bias)
    _set(parameters, values)
    layer.to(x.device)
    (x,) = _leaves(x)

    def run() -> None:
        composed_backward(_layer_loss(layer(x)), [layer])

    return _variant("composed", run, (x, *parameters))


@torch.no_grad()
def _set(parameters: tuple[Tensor, ...], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value.view(p.shape))


def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def linear_variants(
    case: LinearCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Every way of doing the step of one fully connected layer."""
    torch.manual_seed(0)
    d, batch = case.features, case.batch
    x = torch.randn(batch, d)
    weight = torch.eye(d) + torch.randn(d, d) / (10 * d**0.5)
    tensors = tuple(t.to(device) for t in (x, weight, weight.T.contiguous(), 0.01 * torch.randn(d)))
    x, weight, weight_inv, bias = tensors

    variants = []
    if native_is_built():
        layer = snf_ext.SelfNormLinear(d)
        variants.append(_module("native", layer, tensors, backend="native"))
    variants.append(_operator("reference", snf_ext.reference.snf_linear, tensors))
    if compiled:
        function = _compiled(snf_ext.reference.snf_linear)
        variants.append(_operator("compiled reference", function, tensors))
    variants.append(_composed(ComposedLinear(d), tensors))

    for name, function in (
        ("exact", baselines.exact_linear),
        ("relative", baselines.relative_linear),
    ):
        leaves = _leaves(x, weight, bias)

        def run(function=function, leaves=leaves) -> None:
            _layer_loss(*function(*leaves)).backward()

        variants.append(_variant(name, run, leaves, comparable=False))

    delta, error = torch.randn(2, batch, d, device=device).unbind()
    args = (x, delta, error, weight, weight_inv)
    out = [torch.empty_like(t) for t in baselines.linear_products(*args)]
    return [
        *variants,
        Variant("products (fresh)", lambda: baselines.linear_products(*args)),
        Variant("products (out=)", lambda: baselines.linear_products(*args, out=out)),
    ]


def conv_variants(
    case: ConvCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Every way of doing the step of one convolution layer."""
    torch.manual_seed(0)
    c, k = case.channels, case.kernel
    x = torch.randn(case.batch, c, case.height, case.width)
    weight = nn.init.dirac_(torch.empty(c, c, k, k))
    weight += torch.randn_like(weight) / (10 * k * c**0.5)
    weight_inv = weight.flip(2, 3).transpose(0, 1).contiguous()
    tensors = tuple(t.to(device) for t in (x, weight, weight_inv, 0.01 * torch.randn(c)))
    x, weight, weight_inv, _ = tensors

    variants = []
    if native_is_built():
        layer = snf_ext.SelfNormConv2d(c, k)
        variants.append(_module("native", layer, tensors, backend="native"))
    variants.append(_operator("reference", snf_ext.reference.snf_conv2d, tensors))
    if compiled:
        function = _compiled(snf_ext.reference.snf_conv2d)
        variants.append(_operator("compiled reference", function, tensors))
    variants.append(_composed(ComposedConv2d(c, k), tensors))

    if case.features <= EXACT_CONV_FEATURES:
        exact = snf_ext.ExactConv2d(c, k).to(device)
        _set((exact.weight, exact.bias), [weight, tensors[3]])
        (leaf,) = _leaves(x)

        def run() -> None:
            _layer_loss(*exact(leaf)).backward()

        leaves = (leaf, exact.weight, exact.bias)
        variants.append(_variant("exact (dense)", run, leaves, comparable=False))

    delta, error = torch.randn(2, *x.shape, device=device).unbind()
    args = (x, delta, error, weight, weight_inv)
    return [*variants, Variant("stock products", lambda: baselines.conv_products(*args))]


def model_variants(
    case: ModelCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Training steps of the fully connected model: zero_grad, loss, backward, Adam.

    Both sides get the same images and the same optimizer; "fused Adam" is torch's own option.
    """
    torch.manual_seed(0)
    x = torch.randint(256, (case.batch, *case.event_shape), device=device).float()
    variants = []
    backends = ["native", "reference"] if native_is_built() else ["reference"]
    for backend in backends:
        for fused in (False, True):
            flow = snf_ext.models.fc(event_shape=case.event_shape, layers=case.layers).to(device)
            flow.train()
            step = _train(flow, lambda flow=flow: flow.loss(x).backward(), fused)
            name = f"{backend}, fused Adam" if fused else backend
            variants.append(Variant(name, step, _backend(backend)))
    for label, base in (("DxD base", "multivariate"), ("normal base", "normal")):
        composed = ComposedFC(case.event_shape, case.layers, base=base).to(device)
        step = _train(composed, lambda flow=composed: flow.training_backward(x), fused=False)
        variants.append(Variant(f"composed, {label}", step))
    return [*variants, Variant("1024^3 product", product_step(device))]


def _train(model: nn.Module, backward: Callable[[], None], fused: bool) -> Callable[[], None]:
    # A small rate: hundreds of steps on one batch must not leave the range of a real run.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=fused or None)

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step
