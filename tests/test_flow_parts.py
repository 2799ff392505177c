"""What is particular to the element-wise bijections, permutations, batch norm, dequantization."""

from __future__ import annotations

import math

import pytest
import torch

import snf_ext


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spline_on_its_knots_and_bounds(dtype):
    """Knots are the ends of the bins; both sides of each must agree, and come back."""
    f = snf_ext.RationalQuadraticSpline((4,), bins=6, tail_bound=3.0).to(dtype)
    with torch.no_grad():
        for p in f.parameters():
            p.normal_()
    sizes = 1e-3 + (1 - 6e-3) * torch.softmax(f.widths.detach(), -1)
    knots = (6 * sizes.cumsum(-1) - 3).T
    bounds = torch.tensor([-3.0, 3.0], dtype=dtype)[:, None].expand(2, 4)
    limit = torch.finfo(dtype).eps * 100
    x = torch.cat([knots, bounds, torch.nextafter(bounds, 2 * bounds), 1e4 * bounds])
    z, log_det, _ = f(x)
    assert torch.isfinite(log_det).all()
    assert (f.inverse(z) - x).abs().div(x.abs().clamp(min=1)).max() < limit
    assert torch.equal(z[-6:], x[-6:])
    assert torch.equal(log_det[-4:], torch.zeros(4, dtype=dtype))
    for side in (-math.inf, math.inf):
        near = torch.nextafter(x, torch.full_like(x, side))
        assert (f(near).z - z).abs().div(x.abs().clamp(min=1)).max() < limit


def test_spline_starts_near_the_identity():
    f = snf_ext.RationalQuadraticSpline((3, 4, 5))
    assert sum(p.numel() for p in f.parameters()) == 14 * 60
    assert f.derivatives.shape == (3, 4, 5, 4)
    std = torch.cat([p.flatten() for p in f.parameters()]).std().item()
    assert std == pytest.approx(0.01, rel=0.1)
    x = 20 * torch.rand(50, 3, 4, 5) - 10
    assert 0 < (f(x).z - x).abs().max() < 0.5


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 0.1), (5.0, 0.01), (0.1, 10.0), (100.0, 1e-4), (1.0, 1e-6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_tanh_inverse_converges(alpha, beta, dtype):
    """By the residual, relative to z: however flat the map, x is as good as z allows."""
    f = snf_ext.SmoothTanh(alpha, beta)
    size = torch.cat([torch.linspace(1e-4, 4, 4001), torch.logspace(-30, 6, 400)]).to(dtype)
    z = torch.cat([size, -size, torch.zeros(1, dtype=dtype)])[None]
    x = f.inverse(z)
    assert torch.isfinite(x).all()
    back = torch.tanh(alpha * x.double()) + beta * x.double()
    # A rounding of x moves z by at most half a unit of x times the slope there.
    slope = alpha / torch.cosh(alpha * x.double()).square() + beta
    unit = torch.finfo(dtype).eps * (z.abs() + slope * x.abs())
    assert ((back - z.double()).abs() <= 4 * unit).all()


def test_smooth_tanh_of_the_largest_numbers():
    z = torch.tensor([[3e38, -3e38, 1e37, 1e-40]])
    assert torch.isfinite(snf_ext.SmoothTanh().inverse(z)).all()


def test_learnable_slope():
    f = snf_ext.LearnableLeakyReLU()
    with torch.no_grad():
        f.p.fill_(math.log(3))  # sigmoid: 3/4
    z, log_det, _ = f(torch.tensor([[-2.0, 4.0, -1.0]]))
    assert z.tolist() == [pytest.approx([-2.5, 4.0, -1.25])]
    assert log_det.item() == pytest.approx(2 * math.log(1.25))


def test_permutation():
    x = torch.tensor([[10.0, 20.0, 30.0]])
    given = snf_ext.Permutation(3, permutation=[2, 0, 1])
    assert given(x).z.tolist() == [[30.0, 10.0, 20.0]]
    assert snf_ext.Permutation.reverse(3)(x).z.tolist() == [[30.0, 20.0, 10.0]]
    first, second = (snf_ext.Permutation(50, seed=seed) for seed in (1, 2))
    assert torch.equal(first.permutation, snf_ext.Permutation(50, seed=1).permutation)
    assert not torch.equal(first.permutation, second.permutation)
    first.load_state_dict(second.state_dict())
    x = torch.randn(2, 50)
    assert torch.equal(first(x).z, second(x).z)
    assert torch.equal(first.inverse(second(x).z), x)


def test_unsqueeze_undoes_squeeze():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(snf_ext.Unsqueeze()(snf_ext.Squeeze()(x).z).z, x)
    assert snf_ext.Unsqueeze().output_shape((12, 2, 3)) == (3, 4, 6)


def test_affine_by_hand():
    f = snf_ext.ComponentwiseAffine((2,), context_features=1)
    with torch.no_grad():
        f.log_scale.copy_(torch.tensor([1.0, -1.0]))
        f.shift.copy_(torch.tensor([0.5, 0.0]))
    x, context = torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0]])
    assert f(x, context).z.tolist() == [pytest.approx([2 * math.e + 0.5, 3 / math.e])]
    with torch.no_grad():
        f.from_context.weight.copy_(torch.tensor([[1e3], [-1e3], [7.0], [0.0]]))
    z, log_det, _ = f(x, context)
    assert z.tolist() == [pytest.approx([2 * math.exp(3) + 7.5, 3 * math.exp(-3)])]
    assert log_det.item() == pytest.approx(0.0)
    assert f(x, 0 * context).z.tolist() == [pytest.approx([2 * math.e + 0.5, 3 / math.e])]


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 2, 5)])
def test_batch_norm_in_training_mode(shape):
    """Against torch's own layer; log_det is that of the affine map with the batch's numbers."""
    f = snf_ext.BatchNorm(3, momentum=0.3).double()
    with torch.no_grad():
        f.log_scale.normal_()
        f.shift.normal_()
    x = 2 + 3 * torch.randn(shape, dtype=torch.float64)
    z, log_det, _ = f(x)
    weight = f.log_scale.exp().detach()
    want = torch.nn.functional.batch_norm(x, None, None, weight, f.shift, training=True, eps=f.eps)
    torch.testing.assert_close(z, want)
    # Two elements of one channel: their difference is stretched by that channel's scale.
    columns, images = (t.transpose(0, 1).flatten(1) for t in (x, z))
    scale = (images[:, 1] - images[:, 0]) / (columns[:, 1] - columns[:, 0])
    pixels = math.prod(shape[2:])
    assert log_det.tolist() == pytest.approx([pixels * scale.log().sum().item()] * shape[0])
    torch.testing.assert_close(f.running_mean, 0.3 * columns.mean(1))
    torch.testing.assert_close(f.running_var, 0.7 + 0.3 * columns.var(1, correction=0))


def test_batch_norm_density_uses_the_running_numbers():
    f = snf_ext.BatchNorm(2).double()
    flow = snf_ext.Flow([f], event_shape=(2,))
    x = 3 + 2 * torch.randn(64, 2, dtype=torch.float64)
    for _ in range(3):
        f(x)
    training = flow.train().log_prob(x)
    torch.testing.assert_close(training, flow.eval().log_prob(x))
    torch.testing.assert_close(training[:1], flow.log_prob(x[:1]))
    f.train()
    torch.testing.assert_close(f.inverse(f.exact_forward(x).z), x)
    assert (f.inverse(f(x).z) - x).abs().max() > 0.1  # training forward: the batch's own


def test_batch_norm_needs_two_values():
    f = snf_ext.BatchNorm(2)
    with pytest.raises(ValueError, match=r"more than one value a channel.* got \[1, 2\]"):
        f(torch.zeros(1, 2))
    assert torch.isfinite(f(torch.zeros(1, 2, 1, 2)).z).all()
    assert f(torch.zeros(0, 2)).z.shape == (0, 2)
    assert torch.isfinite(f.running_mean).all()


@pytest.mark.parametrize("shape", [(2, 3, 2), (4,)])
def test_variational_dequantization(shape):
    f = snf_ext.VariationalDequantize(shape, levels=8, width=4, steps=3).double()
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randint(0, 8, (5, *shape))
    torch.manual_seed(4)
    z, log_det, recon = f(x)
    u = z - x
    assert u.min() > 0
    assert u.max() < 1
    assert torch.equal(f.inverse(z), x.double())
    assert not recon.any()
    # The noise that was drawn, and the density of u by the Jacobian of noise -> u at fixed x.
    torch.manual_seed(4)
    noise = torch.randn(5, *shape, dtype=torch.float64)
    image = x.double() / 3.5 - 1
    for i in range(5):

        def to_u(e, i=i):
            v = e[None]
            for coupling in f.couplings:
                v = coupling(v, image[i : i + 1]).z
            return torch.sigmoid(v).flatten()

        torch.testing.assert_close(to_u(noise[i]), u[i].flatten())
        jacobian = torch.autograd.functional.jacobian(to_u, noise[i]).reshape(u[i].numel(), -1)
        log_noise = -0.5 * (noise[i].square() + math.log(2 * math.pi)).sum()
        log_q = log_noise - torch.linalg.slogdet(jacobian).logabsdet
        assert log_det[i].item() == pytest.approx(-log_q.item(), abs=1e-8)
    (z.square().sum() - log_det.sum()).backward()
    for name, p in f.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_variational_dequantization_never_rounds_to_the_next_level():
    f = snf_ext.VariationalDequantize((64,), width=4)
    with torch.no_grad():
        f.couplings[0].net[-1].bias[1::2] = 30.0  # u within a rounding of 1
        f.couplings[1].net[-1].bias[1::2] = 30.0
    x = torch.randint(0, 256, (100, 64), dtype=torch.uint8)
    assert torch.equal(f.inverse(f(x).z), x.float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: snf_ext.RationalQuadraticSpline((3,), bins=0), "bins must be 1 to 999; got 0"),
        (
            lambda: snf_ext.RationalQuadraticSpline((3,), tail_bound=0.0),
            "tail_bound must be in .1e-30, 1e30.; got 0.0",
        ),
        (lambda: snf_ext.RationalQuadraticSpline(()), "event_shape must have positive sizes"),
        (lambda: snf_ext.LeakyReLU(0.0), r"alpha must be in \(0, 1\]; got 0.0"),
        (lambda: snf_ext.SmoothTanh(0.0), "alpha must be positive and finite; got 0.0"),
        (lambda: snf_ext.SmoothTanh(1.0, -1.0), "beta must be positive and finite; got -1.0"),
        (lambda: snf_ext.Permutation(3, 0), "dim must not be 0"),
        (
            lambda: snf_ext.Permutation(3, permutation=[0, 1, 1]),
            r"each of 0..2 once; got \[0, 1, 1",
        ),
        (lambda: snf_ext.Permutation(0), "size must be at least 1; got 0"),
        (lambda: snf_ext.Permutation(3)(torch.zeros(2, 4)), "x must have 3 elements along dim"),
        (
            lambda: snf_ext.Permutation(3, 2).inverse(torch.zeros(2, 3)),
            r"z must have 3 elements along dimension 2; got \[2, 3\]",
        ),
        (lambda: snf_ext.Unsqueeze()(torch.zeros(1, 3, 2, 2)), r"x must .* 4C, H, W\]; got \[1, 3"),
        (
            lambda: snf_ext.Unsqueeze().inverse(torch.zeros(1, 3, 2, 3)),
            r"z must have shape \[B, C, H, W\] with even H and W; got \[1, 3, 2, 3\]",
        ),
        (
            lambda: snf_ext.ComponentwiseAffine((3,))(torch.zeros(2, 4)),
            r"x must have shape \[B, ...\] with events \[3\]; got \[2, 4\]",
        ),
        (
            lambda: snf_ext.ComponentwiseAffine((3,), 2)(torch.zeros(2, 3)),
            r"context must have shape \[B, K\] = \[2, 2\]; got none",
        ),
        (lambda: snf_ext.BatchNorm(3, momentum=0.0), r"momentum must be in \(0, 1\]; got 0.0"),
        (lambda: snf_ext.BatchNorm(3, eps=0.0), "eps must be positive; got 0.0"),
        (lambda: snf_ext.BatchNorm(3)(torch.zeros(2, 4)), "x must have shape .* C = 3"),
        (lambda: snf_ext.VariationalDequantize((2, 3)), r"event_shape must be \(C, H, W\) or"),
        (lambda: snf_ext.VariationalDequantize((4,), 0), "levels must be at least 1; got 0"),
        (
            lambda: snf_ext.VariationalDequantize((4,))(torch.zeros(2, 3)),
            r"x must have shape \[B, ...\] with events \[4\]; got \[2, 3\]",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
