"""Couplings, the split prior made of them, and the probe of their outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import snf_ext
from snf_ext import AdditiveCoupling, AffineCoupling, SplitPrior

both = pytest.mark.parametrize("kind", [AffineCoupling, AdditiveCoupling])


def stirred(module, size=0.3):
    """``module`` with random weights, in float64."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module


@both
@pytest.mark.parametrize("mask", ["channel", "checkerboard", "vector"])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_fresh_coupling_is_the_identity(kind, mask, flipped):
    x = torch.randn((3, 5) if mask == "vector" else (3, 5, 4, 3))
    z, log_det, recon = kind(5, 8, mask=mask, flipped=flipped)(x)
    assert torch.equal(z, x)
    assert not log_det.any()
    assert not recon.any()


def passing_part(mask, flipped, shape):
    """Where elements pass, written out cell by cell."""
    passes = torch.zeros(shape, dtype=torch.bool)
    channels = shape[0]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)):
        c, *cell = index.tolist()
        if mask == "checkerboard":
            passes[tuple(index)] = (sum(cell) % 2 == 0) != flipped
        elif flipped:
            passes[tuple(index)] = c >= channels // 2
        else:
            passes[tuple(index)] = c < channels // 2
    return passes


@both
@pytest.mark.parametrize("mask", ["channel", "checkerboard", "vector"])
@pytest.mark.parametrize("flipped", [False, True])
def test_which_part_passes_and_which_conditions(kind, mask, flipped):
    shape = (5,) if mask == "vector" else (3, 3, 4)
    coupling = stirred(kind(shape[0], 8, mask=mask, flipped=flipped))
    x = torch.randn(1, *shape, dtype=torch.float64)
    passes = passing_part(mask, flipped, shape).flatten()
    z = coupling(x).z
    assert torch.equal(z.flatten()[passes], x.flatten()[passes])
    jacobian = torch.autograd.functional.jacobian(lambda v: coupling(v).z.flatten(), x)
    jacobian = jacobian.reshape(len(passes), len(passes))
    changed = jacobian[~passes]
    # A changed element depends on itself and on what passes, on no other changed one.
    own = changed[:, ~passes]
    assert torch.equal(own, torch.diag(own.diagonal()))
    assert own.diagonal().min() > 0
    assert changed[:, passes].any(1).all()
    if kind is AdditiveCoupling:
        assert torch.equal(own.diagonal(), torch.ones_like(own.diagonal()))


def test_scale_is_bounded():
    coupling = AffineCoupling(2, 4, mask="vector", net=nn.Linear(1, 2))
    with torch.no_grad():
        coupling.net.weight.fill_(1000.0)
    log_det = coupling(torch.tensor([[5.0, 1.0], [-5.0, 1.0]])).log_det
    assert log_det.tolist() == pytest.approx([2.0, -2.0])


def test_own_network():
    """raw and t in turn; computed by hand."""

    class Fixed(nn.Module):
        def forward(self, h):
            raw, t = h[:, :1], torch.full_like(h[:, :1], 3.0)
            return torch.cat([raw, t, -raw, t], 1)

    coupling = AffineCoupling(4, mask="channel", net=Fixed())
    x = torch.tensor([0.5, -0.2, 2.0, 4.0]).view(1, 4, 1, 1)
    scale = math.exp(2 * math.tanh(0.25))
    assert coupling(x).z.flatten().tolist() == pytest.approx(
        [0.5, -0.2, 2 * scale + 3, 4 / scale + 3]
    )
    with pytest.raises(ValueError, match="params must have shape"):
        AffineCoupling(4, net=nn.Conv2d(2, 3, 1))(x)


def test_parameters_of_the_image_network():
    """Glow's network: 3x3, 1x1 and a scaled 3x3 convolution."""
    shapes = {n: tuple(p.shape) for n, p in AffineCoupling(5, 16).net.named_parameters()}
    assert sorted(shapes.values()) == sorted(
        [(16, 2, 3, 3), (16,), (16, 16, 1, 1), (16,), (6, 16, 3, 3), (6,), (6, 1, 1)]
    )


@both
def test_logs_scale_the_network_output(kind):
    coupling = stirred(kind(2, 8))
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    before = coupling.net(x)
    with torch.no_grad():
        coupling.net[-1].logs.add_(0.5)
    torch.testing.assert_close(coupling.net(x), before * math.exp(1.5))


def test_logs_are_learned_without_keeping_the_output():
    last = stirred(AffineCoupling(4, 8)).net[-1]
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = last(x)
    assert y.shape not in kept
    delta, leaves = torch.randn_like(y), [x, *last.parameters()]
    plain = last.conv(x) * (3 * last.logs).exp()
    torch.testing.assert_close(y, plain)
    got = torch.autograd.grad(y, leaves, delta)
    want = torch.autograd.grad(plain, leaves, delta)
    torch.testing.assert_close(got, want)


def test_vector_context_on_images_is_constant_maps():
    coupling = stirred(AffineCoupling(4, 8, context_features=3))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    context = torch.randn(2, 3, dtype=torch.float64)
    maps = context[:, :, None, None].repeat(1, 1, 3, 5)
    for a, b in zip(coupling(x, context), coupling(x, maps), strict=True):
        assert torch.equal(a, b)
    other = coupling(x, context + 1).z
    assert not torch.equal(other, coupling(x, context).z)


IMAGE, VECTOR = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4)


@both
@pytest.mark.parametrize(
    ("settings", "x", "context", "message"),
    [
        ({"context_features": 3}, IMAGE, None, r"context must .* \[B, K\] = \[2, 3\]; got none"),
        ({}, IMAGE, torch.zeros(2, 3), "context must not be given .* got .2, 3."),
        ({}, IMAGE, torch.zeros(2, 1, 3, 3), "context must not be given"),
        ({"context_features": 3}, IMAGE, torch.zeros(2, 4), r"= \[2, 3\]; got \[2, 4\]"),
        ({"context_features": 3}, IMAGE, torch.zeros(1, 3), r"= \[2, 3\]; got \[1, 3\]"),
        (
            {"context_features": 3},
            IMAGE,
            torch.zeros(2, 3, 1, 1),
            r"\[B, K, H, W\] = \[2, 3, 3, 3\]; got \[2, 3, 1, 1\]",
        ),
        (
            {"context_features": 3, "mask": "vector"},
            VECTOR,
            torch.zeros(2, 3, 1, 1),
            r"\[B, K\] = \[2, 3\]; got \[2, 3, 1, 1\]",
        ),
        ({}, VECTOR, None, r"x must have shape \[B, C, H, W\] with C = 4; got \[2, 4\]"),
        ({"mask": "vector"}, IMAGE, None, r"x must have shape \[B, D\] with D = 4; got \[2, 4, 3"),
        ({}, IMAGE[:, :3], None, r"with C = 4; got \[2, 3, 3, 3\]"),
    ],
)
def test_wrong_inputs(kind, settings, x, context, message):
    with pytest.raises(ValueError, match=message):
        kind(4, 8, **settings)(x, context)


@both
@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((4, 8), {"mask": "rows"}, "mask must be one of channel, checkerboard, vector; got 'rows'"),
        ((1, 8), {}, "channels must be at least 2; got 1"),
        ((0, 8), {"mask": "checkerboard"}, "channels must be at least 1; got 0"),
        ((4, 0), {}, "width must be at least 1; got 0"),
        ((4, 8), {"context_features": -1}, "context_features must be at least 0; got -1"),
    ],
)
def test_bad_settings(kind, arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **settings)


def test_default_width_on_an_image():
    x = torch.randn(1, 4, 2, 2)
    assert snf_ext.AffineCoupling(4)(x).z.shape == x.shape


@pytest.mark.parametrize("conditional", [True, False])
def test_split_prior_is_its_parts(conditional):
    rest = [snf_ext.ActNorm(2), snf_ext.Squeeze(), AffineCoupling(8, 6)]
    split = stirred(SplitPrior((5, 4, 4), rest, 6, conditional=conditional)).eval()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    z, log_det, _ = split(x)
    whole, total = x, 0
    if conditional:
        whole, total, _ = split.coupling(x)
        assert torch.equal(whole[:, :2], x[:, :2])
    first = whole[:, :2]
    for part in rest:
        first, more, _ = part(first)
        total = total + more
    assert torch.equal(z, torch.cat([first.flatten(1), whole[:, 2:].flatten(1)], 1))
    torch.testing.assert_close(log_det, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nested_splits_with_context_come_back(dtype):
    inner = SplitPrior((8, 2, 2), [AffineCoupling(4, 8, context_features=2)], 8, context_features=2)
    outer = SplitPrior((4, 4, 4), [snf_ext.Squeeze(), inner], 8, context_features=2)
    stirred(outer, 0.1).to(dtype)
    x, context = torch.randn(6, 4, 4, 4, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    z = outer(x, context).z
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert (outer.inverse(z, context) - x).abs().max() < limit
    assert outer.output_shape((4, 4, 4)) == z.shape[1:] == (64,)


def test_split_prior_passes_exactness_and_recon_on():
    mixing = stirred(snf_ext.SelfNormConv2d(2, 1))
    split = SplitPrior((4, 2, 3), [mixing], 6).double().train()
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    exact = mixing.log_abs_det((2, 3)).item()
    assert abs(exact) > 0.1
    training = split(x)
    assert not training.log_det.any()
    torch.testing.assert_close(training.recon, mixing(x[:, :2]).recon)
    assert training.recon.min() > 0
    assert split.exact_forward(x).log_det.tolist() == pytest.approx([exact] * 3)
    assert split.eval()(x).log_det.tolist() == pytest.approx([exact] * 3)
    back = split.inverse(training.z, exact=True)
    torch.testing.assert_close(back, x)
    assert (split.inverse(training.z) - x).abs().max() > 1e-3
    assert [(type(part), shape) for part, shape in split.parts((4, 2, 3))] == [
        (AffineCoupling, (4, 2, 3)),
        (snf_ext.SelfNormConv2d, (2, 2, 3)),
    ]


def test_a_multi_scale_flow_samples_at_a_temperature():
    flow = snf_ext.Flow(
        [snf_ext.Squeeze(), SplitPrior((4, 2, 2), [snf_ext.ActNorm(2)], 6)], event_shape=(1, 4, 4)
    )
    assert flow.latent_shape == (16,)
    x = torch.randn(8, 1, 4, 4)
    flow.loss(x).backward()
    torch.manual_seed(3)
    cold = flow.sample(5, temperature=0.5)
    torch.manual_seed(3)
    noise = torch.randn(5, 16)
    torch.testing.assert_close(cold, flow.inverse(0.5 * noise))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitPrior((4, 2), []), r"event_shape must be \(C, H, W\) .* got \[4, 2\]"),
        (lambda: SplitPrior((1, 2, 2), []), r"at least 2 channels; got \[1, 2, 2\]"),
        (lambda: SplitPrior((4, 0, 2), []), "event_shape must have positive sizes"),
        (
            lambda: SplitPrior((4, 2, 2), [], conditional=False, context_features=2),
            "context_features must be left out if not conditional",
        ),
        (
            lambda: SplitPrior((4, 2, 2), [], 4)(torch.zeros(2, 4, 2, 3)),
            r"x must have shape \[B, ...\] with events \[4, 2, 2\]; got \[2, 4, 2, 3\]",
        ),
        (
            lambda: SplitPrior((4, 2, 2), [], 4).inverse(torch.zeros(2, 15)),
            r"z must have shape \[B, ...\] with events \[16\]; got \[2, 15\]",
        ),
        (
            lambda: SplitPrior((4, 2, 2), [], 4)(torch.zeros(2, 4, 2, 2), torch.zeros(2, 1)),
            "context must not be given",
        ),
    ],
)
def test_split_prior_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_coupling_outputs():
    inner = AdditiveCoupling(8, 4)
    flow = snf_ext.Flow(
        [AffineCoupling(4, 4), SplitPrior((4, 4, 4), [snf_ext.Squeeze(), inner], 4)], (4, 4, 4)
    )
    x = torch.randn(3, 4, 4, 4)
    with snf_ext.coupling_outputs(flow) as largest:
        flow(x)
        flow(-7 * x)
        flow(x[:0])
    # Fresh couplings are the identity, and the inner one sees half of the channels.
    want = 7 * x.abs().max().item()
    assert {name: value.item() for name, value in largest.items()} == pytest.approx(
        {
            "bijections.0": want,
            "bijections.1.coupling": want,
            "bijections.1.rest.1": 7 * x[:, :2].abs().max().item(),
        }
    )
    flow(100 * x)
    assert largest["bijections.0"].item() == pytest.approx(want)
