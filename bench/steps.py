"""Builds the variants of each case: the same step on the same numbers, done in different ways.

A layer's step is forward and backward through autograd, the gradient of x included. On the CPU the
loss between them is mean_b(|z_b|^2 / 2 - log_det_b + recon_b), a standard normal base and
recon_weight 1. On a GPU backward starts from given gradients of z, log_det and recon: the loss
would be a dozen small kernels, several times the layer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import snf_ext
from snf_ext.layers.relative import relative_linear

from . import baselines
from .cases import ConvCase, LinearCase, ModelCase
from .composition import ComposedConv2d, ComposedLinear
from .exact_dense import dense_log_abs_det, swapped
from .floors import allow_tf32
from .models import composed_like, make_flow
from .timing import Variant, product_step

__all__ = [
    "GPU_STEP",
    "backend_context",
    "backends",
    "conv_variants",
    "linear_variants",
    "model_variants",
    "native_is_built",
]

GPU_STEP = (
    "layers: forward, and backward from given gradients of z, log_det and recon, that of x "
    "included; models: loss, backward, Adam"
)

# Why no CUDA graph is tried: one that fails half-way can spoil those after it.
FACTORISES = "its factorisation may synchronise"
ON_HOST = "its elimination is on the CPU"
ADAM_ON_HOST = "its Adam counts the steps on the host"

End = Callable[..., None]  # the rest of a step, from (z, log_det, recon) or the first of them


def native_is_built(device: torch.device | str = "cpu") -> bool:
    """Whether the native backend can be timed on the device."""
    return bool(snf_ext.build_info()["cuda" if _is_cuda(device) else "cpp"])


def backends(device: torch.device | str = "cpu") -> list[str]:
    """The backends of the package that can be timed on the device."""
    return ["native", "reference"] if native_is_built(device) else ["reference"]


def _is_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def backend_context(name: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What a variant's calls are made in to run on a backend."""
    return lambda: snf_ext.use_backend(name)


@contextlib.contextmanager
def _native_tf32() -> Iterator[None]:
    with snf_ext.use_backend("native"), allow_tf32():
        yield


def _layer_loss(z: Tensor, log_det: Tensor | float = 0.0, recon: Tensor | float = 0.0) -> Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - log_det + recon).mean()


def _ending(x: Tensor) -> End:
    """The rest of a step on the batch x, after the layer's outputs."""
    if _is_cuda(x.device):
        return _given_gradients(x)
    return lambda *outputs: _layer_loss(*outputs).backward()


def _given_gradients(x: Tensor) -> End:
    """Backward without a loss, from gradients that are there."""
    mean = x.new_full((len(x),), 1 / len(x))
    given = (torch.randn_like(x) / len(x), -mean, mean)

    def end(*outputs: Tensor) -> None:
        # The exact layers' recon is a constant.
        pairs = [p for p in zip(outputs, given, strict=False) if p[0].requires_grad]
        torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])

    return end


def _variant(
    name: str,
    run: Callable[[], None],
    leaves: tuple[Tensor, ...],
    backend: str | None = None,
    comparable: bool = True,
    adam: bool = False,
) -> Variant:
    """A step that starts from empty gradients, as after optimizer.zero_grad().

    ``leaves`` are x and the parameters; with ``adam`` a step ends with these updated.
    """
    rest = _adam(leaves[1:]) if adam else None

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        run()
        if rest is not None:
            rest.step()

    context = contextlib.nullcontext if backend is None else backend_context(backend)
    return Variant(name, step, context, leaves if comparable else (), adam=adam)


def _adam(parameters: Sequence[Tensor]) -> torch.optim.Adam:
    """torch's fused Adam, its fastest.

    At so small a rate thousands of steps down the same gradient leave the weights in place.
    """
    capturable = _is_cuda(parameters[0].device)
    return torch.optim.Adam(parameters, lr=1e-9, fused=True, capturable=capturable)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def _operator(
    name: str,
    function: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    end: End,
    comparable: bool = True,
    adam: bool = False,
) -> Variant:
    """A step through a function of x and parameters, by default (x, weight, weight_inv, bias)."""
    leaves = _leaves(*tensors)

    def run() -> None:
        end(*function(*leaves))

    return _variant(name, run, leaves, comparable=comparable, adam=adam)


def _module(
    name: str,
    layer: nn.Module,
    tensors: tuple[Tensor, ...],
    end: End,
    backend: str | None = None,
    adam: bool = False,
) -> Variant:
    """A step through a self-normalizing layer of the package, perhaps with its fused Adam."""
    x, parameters = _load(layer, tensors)
    return _variant(name, lambda: end(*layer(x)), (x, *parameters), backend, adam=adam)


def _composed(
    layer: ComposedConv2d, tensors: tuple[Tensor, ...], end: End, adam: bool = False
) -> Variant:
    x, parameters = _load(layer, tensors)

    def run() -> None:
        end(layer(x))
        layer.reconstruction_backward(1.0)

    return _variant("composed", run, (x, *parameters), adam=adam)


def _load(layer: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gives a layer the case's numbers, on their device; returns x as a leaf, and the parameters.

    Moved first: what ``to`` does to the identity of parameters is up to torch.
    """
    x, *values = tensors
    layer.to(x.device)
    parameters = (layer.weight, layer.weight_inv, layer.bias)
    _set(parameters, values)
    return _leaves(x)[0], parameters


@torch.no_grad()
def _set(parameters: tuple[Tensor, ...], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value.view(p.shape))


def _compiled(
    function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], end: End
) -> list[Variant]:
    """The reference through torch.compile; on a GPU also with the CUDA graphs of torch's own."""
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False)
    variants = [_operator("compiled reference", compiled, tensors, end)]
    if _is_cuda(tensors[0].device):
        own = torch.compile(function, dynamic=False, mode="reduce-overhead")
        variant = _operator("compiled reference, reduce-overhead", own, tensors, end)
        for leaf in variant.leaves:  # as a module's parameters: not copied into the graph's memory
            torch._dynamo.mark_static_address(leaf)
        variants.append(dataclasses.replace(variant, no_graph="it has CUDA graphs of its own"))
    return variants


def linear_variants(
    case: LinearCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Every way of doing the step of one fully connected layer, each with Adam if the case is."""
    torch.manual_seed(0)
    d, batch = case.features, case.batch
    x = torch.randn(batch, d)
    weight = torch.eye(d) + torch.randn(d, d) / (10 * d**0.5)
    tensors = tuple(t.to(device) for t in (x, weight, weight.T.contiguous(), 0.01 * torch.randn(d)))
    x, weight, weight_inv, bias = tensors
    end = _ending(x)

    variants = _native_linear(case, tensors, end) if native_is_built(device) else []
    reference, adam = snf_ext.reference.snf_linear, case.adam
    variants.append(_operator("reference", reference, tensors, end, adam=adam))
    if compiled and not adam:
        variants += _compiled(reference, tensors, end)
    variants.append(_composed(ComposedLinear(d), tensors, end, adam))

    one_weight = (x, weight, bias)
    exact = _operator("exact", baselines.exact_linear, one_weight, end, False, adam)
    variants.append(dataclasses.replace(exact, no_graph=FACTORISES))
    variants.append(_operator("relative", relative_linear, one_weight, end, False, adam))
    if adam:
        return variants

    delta, error = torch.randn(2, batch, d, device=device).unbind()
    args = (x, delta, error, weight, weight_inv)
    out = [torch.empty_like(t) for t in baselines.linear_products(*args)]
    return [
        *variants,
        Variant("products (fresh)", lambda: baselines.linear_products(*args)),
        Variant("products (out=)", lambda: baselines.linear_products(*args, out=out)),
    ]


def _native_linear(case: LinearCase, tensors: tuple[Tensor, ...], end: End) -> list[Variant]:
    """On a GPU always without and with Adam, and where products may round to TF32."""
    x = tensors[0]
    variants = []
    for adam in (False, True) if _is_cuda(x.device) else (case.adam,):
        name = "native, fused Adam" if adam and not case.adam else "native"
        layer = snf_ext.SelfNormLinear(case.features)
        native = _module(name, layer, tensors, end, "native", adam)
        variants.append(native)
        if _is_cuda(x.device):
            name = name.replace("native", "native TF32")
            # Other gradients by the rounding, so not compared.
            variants.append(
                dataclasses.replace(native, name=name, context=_native_tf32, leaves=(), tf32=True)
            )
    if case.over_us:  # judged without the loss, which takes longer than so small a layer
        layer, rest = snf_ext.SelfNormLinear(case.features), _given_gradients(x)
        given = _module("native, given gradients", layer, tensors, rest, "native", case.adam)
        variants.append(dataclasses.replace(given, leaves=()))
    return variants


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
    end = _ending(x)

    variants = []
    if native_is_built(device):
        layer = snf_ext.SelfNormConv2d(c, k)
        variants.append(_module("native", layer, tensors, end, backend="native"))
    variants.append(_operator("reference", snf_ext.reference.snf_conv2d, tensors, end))
    if compiled:
        variants += _compiled(snf_ext.reference.snf_conv2d, tensors, end)
    variants.append(_composed(ComposedConv2d(c, k), tensors, end))

    exact = _exact_conv("exact", tensors, end)
    variants.append(dataclasses.replace(exact, no_graph=ON_HOST))
    if case.features <= case.dense_features:
        dense = _exact_conv("exact (dense)", tensors, end)
        context = functools.partial(swapped, log_abs_det=dense_log_abs_det)
        variants.append(dataclasses.replace(dense, no_graph=FACTORISES, context=context))

    delta, error = torch.randn(2, *x.shape, device=device).unbind()
    args = (x, delta, error, weight, weight_inv)
    return [*variants, Variant("stock products", lambda: baselines.conv_products(*args))]


def _exact_conv(name: str, tensors: tuple[Tensor, ...], end: End) -> Variant:
    x, weight, _, bias = tensors
    layer = snf_ext.ExactConv2d(weight.shape[0], weight.shape[2]).to(x.device)
    _set((layer.weight, layer.bias), [weight, bias])
    (leaf,) = _leaves(x)
    leaves = (leaf, layer.weight, layer.bias)
    return _variant(name, lambda: end(*layer(leaf)), leaves, comparable=False)


def model_variants(
    case: ModelCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """Training steps of a model: zero_grad, loss, backward, Adam.

    All start from the same numbers, and get the same images and the same optimizer; "fused Adam"
    is torch's own option, and the only one of the two that a CUDA graph can hold.
    """
    torch.manual_seed(0)
    start = make_flow(case).to(device).train()
    x = torch.randint(256, (case.batch, *case.event_shape), device=device).float()
    variants = []
    for backend in backends(device):
        for fused in (False, True):
            flow = copy.deepcopy(start)
            step = _train(flow, lambda flow=flow: flow.loss(x).backward(), fused)
            name = f"{backend}, fused Adam" if fused else backend
            no_graph = "" if fused else ADAM_ON_HOST
            variants.append(
                Variant(name, step, backend_context(backend), no_graph=no_graph, adam=True)
            )
    if compiled:  # minutes, most of them for the convolutional model
        torch.compiler.reset()
        flow = copy.deepcopy(start)
        loss = torch.compile(flow.loss, dynamic=False)
        step = _train(flow, lambda: loss(x).backward(), fused=False)
        context, name = backend_context("reference"), "compiled reference"
        variants.append(Variant(name, step, context, no_graph=ADAM_ON_HOST, adam=True))
    for label, base in (("DxD base", "multivariate"), ("normal base", "normal")):
        composed = composed_like(start, case, base)
        step = _train(composed, lambda flow=composed: flow.training_backward(x), fused=False)
        variants.append(Variant(f"composed, {label}", step, no_graph=ADAM_ON_HOST, adam=True))
    if not _is_cuda(device):
        variants.append(Variant("1024^3 product", product_step(device)))
    return variants


def _train(model: nn.Module, backward: Callable[[], None], fused: bool) -> Callable[[], None]:
    # A small rate: hundreds of steps on one batch must not leave the range of a real run.
    capturable = fused and next(model.parameters()).is_cuda
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-6, fused=fused or None, capturable=capturable
    )

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step
