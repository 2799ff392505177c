"""A coupling's network on images against numpy's sums, and the rules of a torch operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import needs_native

import snf_ext
from snf_ext import ops
from snf_ext.layers.conditioner import ImageNetwork
from snf_ext.ops.network import FUSED_WIDTH

NAMES = ("weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3", "log_scale")
# B, C, N, T, H, W: the small Glow's two scales; widths that fill no vector; one pixel, one row.
CASES = {
    "scale-1": (3, 2, 16, 4, 14, 14),
    "scale-2": (20, 4, 16, 8, 7, 7),
    "ragged": (2, 3, 13, 5, 4, 9),
    "wide": (2, 1, 33, 3, 3, 5),
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "row": (2, 2, 3, 2, 1, 26),
}
SMALL = [CASES[name] for name in ("ragged", "one-of-each", "row")]
each = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
small = pytest.mark.parametrize("sizes", SMALL, ids=("ragged", "one-of-each", "row"))


def tensors_of(sizes, dtype=torch.float64, seed=0):
    """x and the seven of the network, far enough from 0 that ReLUs are on and off."""
    b, c, n, t, h, w = sizes
    shapes = [(n, c, 3, 3), (n,), (n, n, 1, 1), (n,), (t, n, 3, 3), (t,), (t, 1, 1)]
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.4).to(dtype)
        for shape in [(b, c, h, w), *shapes]
    ]


def convolution(x, weight, bias):
    """Tap by tap: ``y[b, o, r, c] = sum_{i, a, d} weight[o, i, a, d] x[b, i, r + a, c + d]``."""
    size = weight.shape[2]
    padded = np.pad(x, [(0, 0), (0, 0), *[(size // 2,) * 2] * 2])
    y = np.zeros((len(x), len(weight), *x.shape[2:])) + bias[:, None, None]
    for a in range(size):
        for d in range(size):
            near = padded[:, :, a : a + x.shape[2], d : d + x.shape[3]]
            y += np.einsum("oi,bihw->bohw", weight[:, :, a, d], near)
    return y


def truth(tensors):
    x, w1, b1, w2, b2, w3, b3, logs = (t.detach().double().numpy() for t in tensors)
    h = np.maximum(convolution(x, w1, b1), 0)
    h = np.maximum(convolution(h, w2, b2), 0)
    return torch.from_numpy(convolution(h, w3, b3) * np.exp(3 * logs))


def run(tensors, grad=None):
    """The output, and the gradients of everything."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = ops.image_network(*leaves)
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape) if grad is None else grad
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        scale = b.double().abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str
)
@each
def test_equals_sums_in_numpy(sizes, dtype, tolerance, backend):
    tensors = tensors_of(sizes, dtype)
    y = ops.image_network(*tensors)
    assert y.dtype == dtype
    close([y], [truth(tensors)], tolerance)


@small
def test_gradcheck(sizes, backend):
    tensors = [t.requires_grad_() for t in tensors_of(sizes)]
    assert torch.autograd.gradcheck(ops.image_network, tensors)


@needs_native
@each
def test_gradients_in_both_precisions(sizes):
    with snf_ext.use_backend("reference"):
        want = run(tensors_of(sizes))
    close(run(tensors_of(sizes)), want, 1e-12)
    close(run(tensors_of(sizes, torch.float32)), want, 1e-5)


@needs_native
def test_only_what_is_needed():
    tensors = tensors_of(CASES["ragged"], torch.float32)
    together = run(tensors)[1:]
    for wanted, want in enumerate(together):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        y = ops.image_network(*leaves)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (alone,) = torch.autograd.grad(y, leaves[wanted], grad)
        assert torch.equal(alone, want)


@needs_native
@pytest.mark.parametrize("name", ["scale-1", "scale-2"])
def test_same_bits_for_any_number_of_threads(name):
    tensors = tensors_of((37, *CASES[name][1:]), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_slices_of_channels_and_other_strides():
    x, *rest = tensors_of(CASES["ragged"])
    plain = run([x, *rest])
    whole = torch.cat((torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)), 1)
    for same in (whole[:, 3:6], x.mT.contiguous().mT, x.to(memory_format=torch.channels_last)):
        assert all(torch.equal(a, b) for a, b in zip(run([same, *rest]), plain, strict=True))


@needs_native
def test_nan_goes_on_as_in_torch():
    tensors = tensors_of(CASES["ragged"], torch.float32)
    tensors[0][0, 0, 1, 2] = torch.nan
    with snf_ext.use_backend("reference"):
        want = run(tensors)
    for a, b in zip(run(tensors), want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_empty_batch(backend):
    tensors = tensors_of((0, *CASES["ragged"][1:]))
    y, *grads = run(tensors)
    assert y.shape == (0, 5, 4, 9)
    assert all(not g.any() for g in grads)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_compute_in_float32(dtype):
    tensors = tensors_of(CASES["ragged"], dtype)
    want = run([t.float() for t in tensors])
    got = run(tensors)
    assert all(t.dtype == dtype for t in got)
    close(got, want, torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ops.image_network(*tensors)
    assert under.dtype == torch.float32
    assert torch.equal(under, want[0])


@needs_native
def test_opcheck():
    tensors = [t.float().requires_grad_() for t in tensors_of(CASES["ragged"])]
    torch.library.opcheck(torch.ops.snf_ext.image_network.default, tensors)
    grad = torch.ones(2, 5, 4, 9)
    for mask in ([True] * 8, [True] + [False] * 7, [False] * 7 + [True]):
        arguments = (grad, *(t.detach() for t in tensors), mask)
        torch.library.opcheck(torch.ops.snf_ext.image_network_backward.default, arguments)


@needs_native
def test_double_backward_is_refused_with_the_way_out():
    tensors = [t.requires_grad_() for t in tensors_of(CASES["ragged"])]
    (grad,) = torch.autograd.grad(
        ops.image_network(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"no native second derivative.*use_backend"):
        grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types_are_checked(name, backend):
    tensors = dict(zip(("x", *NAMES), tensors_of(CASES["ragged"]), strict=True))
    letters = {"weight_1": "N, C, 3, 3", "bias_1": "N", "weight_2": "N, N, 1, 1", "bias_2": "N"}
    letters |= {"weight_3": "T, N, 3, 3", "bias_3": "T", "log_scale": "T, 1, 1"}
    for bad, error, message in (
        (tensors[name].unsqueeze(0), ValueError, rf"{name} must have shape \[{letters[name]}"),
        (tensors[name].float(), TypeError, f"{name} must have the dtype of x, torch.float64; got"),
    ):
        with pytest.raises(error, match=message):
            ops.image_network(*(tensors | {name: bad}).values())


def test_x_is_checked(backend):
    x, *rest = tensors_of(CASES["ragged"])
    for bad, error, message in (
        (x[0], ValueError, r"x must have shape \[B, C, H, W\]; got \[3, 4, 9\]"),
        (x[:, :, :0], ValueError, r"x must have at least one pixel; got \[2, 3, 0, 9\]"),
        (x[:, :2], ValueError, r"weight_1 must have shape .* = \[13, 2, 3, 3\]; got"),
        (x.long(), TypeError, r"x must be a floating-point tensor; got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            ops.image_network(bad, *rest)


@needs_native
@pytest.mark.parametrize("width", [8, FUSED_WIDTH, FUSED_WIDTH + 1])
def test_the_module_is_its_sequence(width):
    torch.manual_seed(0)
    network = ImageNetwork(3, 4, width).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    leaves = [x.requires_grad_(), *network.parameters()]
    plain = torch.nn.Sequential(*network)
    grads = [torch.autograd.grad(f(x).square().sum(), leaves) for f in (network, plain)]
    close([network(x), *grads[0]], [plain(x), *grads[1]], 1e-12)


def _elu(network):
    network[1] = torch.nn.ELU()


def _double(network):
    network[2].register_forward_hook(lambda module, args, y: 2 * y)


def _old_norm(network):
    torch.nn.utils.weight_norm(network[0])
    with torch.no_grad():
        network[0].weight_g.mul_(3)


def _parametrised(network):
    torch.nn.utils.parametrizations.spectral_norm(network[4].conv)
    network.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", [_elu, _double, _old_norm, _parametrised])
def test_a_module_that_was_changed_counts(change, backend):
    torch.manual_seed(0)
    network = ImageNetwork(2, 3, 8).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    before = network(x)
    change(network)
    after = network(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, torch.nn.Sequential(*network)(x))
