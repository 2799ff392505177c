"""Exact values against dense matrices, and the cache that keeps them."""

from __future__ import annotations

import copy

import ground_truth
import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import SelfNormConv2d, SelfNormLinear, exact


def dense_log_abs_det(layer, size=None):
    if size is None:
        matrix = layer.weight.detach().double().cpu().numpy()
    else:
        shape = layer.shape
        matrix = ground_truth.conv_matrix(
            layer.weight.detach().cpu(), size, shape.dilation, shape.groups, shape.circular
        )
    return np.linalg.slogdet(matrix)[1]


def drawn_conv(seed):
    """A random layer of random shape, well away from the identity."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 4))
    layer = SelfNormConv2d(
        groups * int(rng.integers(1, 4)),
        tuple(int(s) for s in rng.choice([1, 3, 5, 7], 2)),
        dilation=int(rng.integers(1, 3)),
        groups=groups,
        bias=bool(rng.integers(2)),
        padding_mode=str(rng.choice(["zeros", "circular"])),
    ).double()
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    return layer, (int(rng.integers(1, 8)), int(rng.integers(1, 8)))


@pytest.mark.parametrize("seed", range(20))
def test_conv_against_dense(seed, device):
    layer, size = drawn_conv(seed)
    shape = layer.shape
    matrix = ground_truth.conv_matrix(
        layer.weight.detach(), size, shape.dilation, shape.groups, shape.circular
    )
    layer = layer.to(device)
    ours = exact.conv2d_matrix(layer.weight, size, *shape.geometry)
    np.testing.assert_array_equal(ours.detach().cpu(), matrix)
    assert abs(layer.log_abs_det(size).item() - np.linalg.slogdet(matrix)[1]) < 1e-8
    x = torch.randn(3, shape.channels, *size, dtype=torch.float64, device=device)
    z = layer(x).z
    assert (layer.inverse(z, exact=True) - x).abs().max() < 1e-6


@pytest.mark.parametrize("features", [1, 2, 17, 100])
def test_linear_against_dense(features, device):
    layer = SelfNormLinear(features).double().to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(features, features))
    assert abs(layer.log_abs_det().item() - dense_log_abs_det(layer)) < 1e-8
    x = torch.randn(5, features, dtype=torch.float64, device=device)
    assert (layer.inverse(layer(x).z, exact=True) - x).abs().max() < 1e-6


def test_gradient_of_the_matrix():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: exact.conv2d_log_abs_det(w, (2, 3), 1, 2, True), (weight,)
    )


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_pointwise_against_dense(groups, device):
    """A 1x1 kernel is solved pixel by pixel; the whole matrix says what comes out."""
    size, weight = (3, 5), torch.randn(6, 6 // groups, 1, 1, dtype=torch.float64)
    matrix = torch.as_tensor(ground_truth.conv_matrix(weight, size, 1, groups, False))
    leaf = weight.to(device).requires_grad_()
    value = exact.conv2d_log_abs_det(leaf, size, 1, groups, False)
    value.backward()
    assert abs(value.item() - torch.linalg.slogdet(matrix).logabsdet.item()) < 1e-10
    # d log|det| / dW[o, i] sums the transposed inverse over all places of the element.
    inverse = torch.linalg.inv(matrix).T.reshape(6, 15, 6, 15)
    everywhere = inverse.diagonal(dim1=1, dim2=3).sum(-1)
    per_group = 6 // groups
    for o in range(6):
        start = o // per_group * per_group
        want = everywhere[o, start : start + per_group]
        torch.testing.assert_close(leaf.grad[o, :, 0, 0].cpu(), want, rtol=1e-9, atol=1e-9)
    factors = exact.factorize_conv2d(leaf, size, 1, groups, False)
    assert abs(factors.log_abs_det.item() - value.item()) < 1e-10
    rhs = torch.randn(4, 90, dtype=torch.float64)
    got = factors.solve(rhs.to(device)).cpu()
    torch.testing.assert_close(got, torch.linalg.solve(matrix, rhs.T).T, rtol=1e-8, atol=1e-8)
    assert factors.solve(rhs[:0].to(device)).shape == (0, 90)


def test_pointwise_needs_no_dense_matrix():
    """64x64 images of 48 channels: a matrix of 196,608 on a side would be 300 GB."""
    layer = SelfNormConv2d(48, 1)
    x = torch.randn(1, 48, 64, 64)
    want = 64 * 64 * np.linalg.slogdet(layer.weight[..., 0, 0].detach().double().numpy())[1]
    assert layer.log_abs_det((64, 64)).item() == pytest.approx(want, rel=1e-5)
    assert (layer.inverse(layer(x).z, exact=True) - x).abs().max() < 1e-4
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.log_abs_det((4, 4)).item() == -float("inf")
    with pytest.raises(ValueError, match="weight is singular"):
        layer.inverse(x, exact=True)


def test_singular():
    layer = SelfNormLinear(3)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.log_abs_det().item() == -float("inf")
    with pytest.raises(ValueError, match="weight is singular"):
        layer.inverse(torch.zeros(1, 3), exact=True)


def edit_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(1.1)


def edit_one_element(layer):
    with torch.no_grad():
        layer.weight.view(-1)[0] += 0.5


def edit_data(layer):
    layer.weight.data[0] *= 2


def replace_data(layer):
    layer.weight.data = layer.weight.data * 1.2


def replace_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.8)


def load(layer):
    state = copy.deepcopy(layer.state_dict())
    state["weight"] *= 1.3
    layer.load_state_dict(state)


def assign(layer):
    state = {k: v * 1.3 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def step(optimizer_class, **kwargs):
    def change(layer):
        x = torch.randn(4, *((2, 5, 4) if layer.weight.dim() == 4 else (6,))).to(layer.weight)
        layer.train()
        z, log_det, recon = layer(x)
        (z.square().sum() - log_det.sum() + recon.sum()).backward()
        optimizer_class(layer.parameters(), lr=0.1, **kwargs).step()
        layer.eval()

    return change


CHANGES = {
    "in-place": edit_in_place,
    "one element": edit_one_element,
    ".data": edit_data,
    "new .data": replace_data,
    "new parameter": replace_parameter,
    "load_state_dict": load,
    "load_state_dict(assign)": assign,
    "to(float64)": lambda layer: layer.to(torch.float64),
    "sgd": step(torch.optim.SGD),
    "adam": step(torch.optim.Adam),
    "adam-foreach": step(torch.optim.Adam, foreach=True),
    "adam-fused": step(torch.optim.Adam, fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_cache_follows_the_weight(kind, change, device):
    layer, size = (SelfNormLinear(6), None) if kind == "linear" else (SelfNormConv2d(2, 3), (5, 4))
    layer.to(device).eval()
    arguments = () if size is None else (size,)
    x = torch.randn(2, *((6,) if size is None else (2, *size)), device=device)
    before = layer.log_abs_det(*arguments).item()
    layer.inverse(x, exact=True)
    change(layer)
    want = dense_log_abs_det(layer, size)
    x = x.to(layer.weight)
    assert abs(layer.log_abs_det(*arguments).item() - want) < 1e-5
    assert abs(layer(x).log_det[0].item() - want) < 1e-5
    assert (layer.inverse(layer(x).z, exact=True) - x).abs().max() < 1e-4
    if change is not CHANGES["to(float64)"]:
        assert abs(want - before) > 1e-4  # the change is one that a stale value would miss


def test_cache_keeps_sizes_apart():
    layer = SelfNormConv2d(1, 3).eval()
    with torch.no_grad():
        layer.weight.add_(0.1)
    for size in [(4, 4), (6, 3), (4, 4), (3, 6), (2, 2), (5, 5), (7, 7), (4, 4)]:
        assert abs(layer.log_abs_det(size).item() - dense_log_abs_det(layer, size)) < 1e-5


def test_factorised_once_for_one_weight(monkeypatch):
    made = []
    plain = exact.of_layer.factorize_linear
    monkeypatch.setattr(exact.of_layer, "factorize_linear", lambda w: made.append(1) or plain(w))
    layer = SelfNormLinear(5).eval()
    x = torch.randn(3, 5)
    for _ in range(3):
        layer(x)
        layer.log_abs_det()
        layer.inverse(x, exact=True)
    assert len(made) == 1


def test_training_factorises_nothing(monkeypatch):
    def fail(*args):
        raise AssertionError("an exact value was computed in training")

    monkeypatch.setattr(exact.of_layer, "factorize_linear", fail)
    monkeypatch.setattr(exact.of_layer, "factorize_conv2d", fail)
    flow = snf_ext.Flow(
        [SelfNormConv2d(1, 3), snf_ext.Flatten((1, 4, 4)), SelfNormLinear(16)], (1, 4, 4)
    )
    flow.loss(torch.randn(3, 1, 4, 4)).backward()
    flow.sample(3)


def test_stays_exact_after_exact_training():
    """The public code's value went stale here."""
    layer = snf_ext.ExactLinear(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        z, log_det, _ = layer(x)
        (z.square().sum(1) / 2 - log_det).mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert abs(layer.log_abs_det().item() - dense_log_abs_det(layer)) < 1e-5
