"""The layers that are compared with: against dense matrices, and their errors."""

from __future__ import annotations

import ground_truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from snf_ext import (
    EmergingConv2d,
    ExactLinear,
    ExponentialConv2d,
    HouseholderConv1x1,
    LUConv1x1,
    PlainConv1x1,
    RelativeLinear,
)
from snf_ext.layers.exponential import series_terms
from snf_ext.layers.spectral import spectral_norm_bound

GLOW = [PlainConv1x1, LUConv1x1, HouseholderConv1x1]


def dense_matrix(layer, shape):
    """Column i is what the linear part of the layer makes of the i-th unit vector."""
    unit = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return (layer(unit).z - layer(torch.zeros_like(unit)).z).flatten(1).T


def away_from_start(layer, size=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return layer


# ---- Relative gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_relative_gradient_is_the_exact_one_times_gram(shape, mode):
    """In float64, with another weight of each sample in the loss, and scaled."""
    torch.manual_seed(1)
    layer = away_from_start(RelativeLinear(5), 0.3)
    getattr(layer, mode)()
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(shape, dtype=torch.float64) * 1024
    z, log_det, _ = layer(x)
    (scale * (z.pow(4).sum(-1) - log_det)).sum().backward()
    got = [t.grad.clone() for t in (x, layer.weight, layer.bias)]

    weight = layer.weight.detach().requires_grad_()
    bias, x_ = layer.bias.detach().requires_grad_(), x.detach().requires_grad_()
    z = x_ @ weight.T + bias
    (scale * (z.pow(4).sum(-1) - torch.linalg.slogdet(weight).logabsdet)).sum().backward()
    gram = weight.detach().T @ weight.detach()
    torch.testing.assert_close(got, [x_.grad, weight.grad @ gram, bias.grad])


def test_relative_gradient_without_log_det_or_bias():
    layer = away_from_start(RelativeLinear(3, bias=False), 0.3)
    x = torch.randn(4, 3, dtype=torch.float64)
    layer(x).z.square().sum().backward()
    weight = layer.weight.detach()
    exact = 2 * (x @ weight.T).T @ x
    torch.testing.assert_close(layer.weight.grad, exact @ weight.T @ weight)


def test_relative_linear_says_singular():
    layer = RelativeLinear(2)
    torch.nn.init.zeros_(layer.weight)
    assert layer.log_abs_det() == -torch.inf
    with pytest.raises(ValueError, match="weight is singular"):
        layer.inverse(torch.zeros(1, 2))


# ---- Glow's 1x1 convolutions -------------------------------------------------------------------


@pytest.mark.parametrize("make", GLOW)
def test_glow_mixing_starts_orthogonal(make):
    torch.manual_seed(2)
    layer = make(6).double()
    matrix = layer.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6).double(), atol=1e-5, rtol=0)
    assert (matrix - torch.eye(6)).abs().max() > 0.1
    assert layer(torch.zeros(2, 6, 3, 3).double()).log_det.abs().max() < 1e-4
    assert not layer.bias.any()


@pytest.mark.parametrize("make", GLOW)
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_glow_mixing_is_its_matrix_at_each_pixel(make, channels):
    torch.manual_seed(3)
    layer = away_from_start(make(channels))
    height, width = 2, 3
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    z, log_det, _ = layer(x)
    matrix = layer.matrix().detach().numpy()
    want = np.einsum("oi,bihw->bohw", matrix, x.numpy())
    want += layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(z.detach().numpy(), want, rtol=0, atol=1e-12)
    dense = np.linalg.slogdet(np.kron(matrix, np.eye(height * width)))[1]
    np.testing.assert_allclose(log_det.detach().numpy(), dense, rtol=0, atol=1e-10)
    np.testing.assert_allclose(layer.inverse(z).detach().numpy(), x.numpy(), rtol=0, atol=1e-10)


def test_lu_matrix_is_p_l_u():
    torch.manual_seed(4)
    layer = away_from_start(LUConv1x1(5))
    assert (layer.sign < 0).any()  # a start that the signs matter for
    n = np.arange(5)
    p = np.zeros((5, 5))
    p[n, layer.permutation.numpy()] = 1
    lower = np.tril(layer.lu.detach().numpy(), -1) + np.eye(5)
    s = layer.sign.numpy() * np.exp(layer.log_s.detach().numpy())
    upper = np.triu(layer.lu.detach().numpy(), 1) + np.diag(s)
    np.testing.assert_allclose(layer.matrix().detach().numpy(), p @ lower @ upper, atol=1e-12)


def test_householder_matrix_is_the_product_of_reflections():
    torch.manual_seed(5)
    layer = HouseholderConv1x1(4, reflections=3).double()
    want = np.eye(4)
    for v in layer.vectors.detach().numpy():
        want = want @ (np.eye(4) - 2 * np.outer(v, v) / (v @ v))
    np.testing.assert_allclose(layer.matrix().detach().numpy(), want, atol=1e-12)
    assert round(np.linalg.det(want)) == -1


def test_plain_mixing_says_singular():
    layer = PlainConv1x1(2)
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="weight is singular"):
        layer.inverse(torch.zeros(1, 2, 3, 3))


# ---- Emerging convolution ----------------------------------------------------------------------


def raster_order(channels, size):
    """Where each place of ``flatten(1)`` stands with pixels slowest and the channel fastest."""
    return np.arange(channels * size[0] * size[1]).reshape(channels, -1).T.flatten()


def embedded(weight, upper):
    """A quadrant as the kernel of odd size that it is a part of."""
    rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
    return F.pad(weight, (columns, 0, rows, 0) if upper else (0, columns, 0, rows)).detach().numpy()


@pytest.mark.parametrize(
    ("channels", "kernel_size", "size"), [(2, 3, (4, 3)), (3, 5, (2, 3)), (1, (3, 1), (3, 1))]
)
def test_emerging_matrix_is_lower_and_upper(channels, kernel_size, size):
    """From the dense matrix of a public kernel, zeroed outside the triangle it must be in."""
    torch.manual_seed(6)
    layer = away_from_start(EmergingConv2d(channels, kernel_size))
    order = raster_order(channels, size)
    inverse_order = np.argsort(order)
    factors = []
    for weight, upper in ((layer.lower, False), (layer.upper, True)):
        matrix = ground_truth.conv_matrix(embedded(weight, upper), size)[np.ix_(order, order)]
        triangle = np.triu(matrix) if upper else np.tril(matrix)
        # Only the pixel's own tap has something on the other side.
        blocks = np.kron(np.eye(size[0] * size[1]), np.ones((channels, channels)))
        assert not (matrix - triangle)[blocks == 0].any()
        factors.append(triangle)
    pointwise = np.kron(np.eye(size[0] * size[1]), layer.pointwise.weight.detach().numpy())
    in_raster = factors[1] @ factors[0] @ pointwise
    want = in_raster[np.ix_(inverse_order, inverse_order)]
    np.testing.assert_allclose(dense_matrix(layer, (channels, *size)).numpy(), want, atol=1e-12)
    log_det = np.linalg.slogdet(want)[1]
    assert abs(layer.log_abs_det(size).item() - log_det) < 1e-10


def test_emerging_of_size_three_has_kernels_of_two_by_two():
    layer = EmergingConv2d(4, 3)
    assert layer.lower.shape == layer.upper.shape == (4, 4, 2, 2)


def test_emerging_window_is_the_whole_kernel():
    """Apart from the zeros around the image, whose reach the two orders share."""
    layer = away_from_start(EmergingConv2d(1, 3))
    seen = dense_matrix(layer, (1, 5, 5)).reshape(5, 5, 5, 5)[2, 2] != 0
    assert seen[1:4, 1:4].all()
    assert seen.sum() == 9


@pytest.mark.parametrize("name", ["lower", "upper", "pointwise.weight"])
def test_emerging_says_singular(name):
    layer = EmergingConv2d(3)
    with torch.no_grad():
        weight = layer.get_parameter(name)
        weight.zero_()
    assert layer.log_abs_det((2, 2)) == -torch.inf
    with pytest.raises(ValueError, match="weight is singular"):
        layer.inverse(torch.zeros(1, 3, 2, 2))


# ---- The exponential ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm_bound", [0.9, 3.0])
@pytest.mark.parametrize(
    ("channels", "kernel_size", "size"), [(2, 3, (4, 3)), (3, (1, 5), (2, 3)), (1, 3, (1, 1))]
)
def test_exponential_is_matrix_exp(channels, kernel_size, size, norm_bound):
    torch.manual_seed(7)
    layer = away_from_start(ExponentialConv2d(channels, kernel_size, norm_bound=norm_bound), 1.0)
    matrix = torch.from_numpy(ground_truth.conv_matrix(layer.kernel().detach().numpy(), size))
    pointwise = torch.kron(layer.pointwise.weight.detach(), torch.eye(size[0] * size[1]).double())
    want = torch.linalg.matrix_exp(matrix) @ pointwise
    got = dense_matrix(layer, (channels, *size))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * np.exp(norm_bound))
    log_det = torch.linalg.slogdet(want).logabsdet
    torch.testing.assert_close(layer.log_abs_det(size).detach(), log_det, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [0.1, 0.9, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_series_ends_at_the_precision(norm, dtype):
    n = series_terms(norm, dtype)
    with np.errstate(all="ignore"):
        powers = np.cumprod([1.0] + [norm / i for i in range(1, 80)])
    eps = torch.finfo(dtype).eps
    assert powers[n + 1 :].sum() < eps
    assert powers[n:].sum() >= eps  # one term less would not do


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 6), (12, 12)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5), (5, 3)])
def test_spectral_bound_holds_for_every_size(kernel, size):
    generator = torch.Generator().manual_seed(8)
    for scale in (1e-3, 1.0, 1e3):
        channels = 2
        k = scale * torch.randn(channels, channels, *kernel, generator=generator).double()
        norm = np.linalg.norm(ground_truth.conv_matrix(k.numpy(), size), 2)
        assert norm <= spectral_norm_bound(k).item() * (1 + 1e-12)


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_spectral_bound_is_near(channels):
    """To the largest norm over a fine grid of frequencies, which wide images come near."""
    generator = torch.Generator().manual_seed(9)
    k = torch.randn(channels, channels, 3, 3, generator=generator).double()
    transfer = torch.fft.fft2(k, s=(96, 96)).permute(2, 3, 0, 1)
    norm = torch.linalg.matrix_norm(transfer, 2).max().item()
    assert norm <= spectral_norm_bound(k).item() <= 1.08 * channels ** (1 / 64) * norm


def test_spectral_bound_of_nothing_and_its_gradient():
    assert spectral_norm_bound(torch.zeros(2, 2, 3, 3)).item() < 1e-15
    k = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(10)).double()
    assert torch.autograd.gradcheck(spectral_norm_bound, (k.requires_grad_(),))
    layer = ExponentialConv2d(2)
    torch.nn.init.zeros_(layer.weight)
    layer(torch.randn(1, 2, 3, 3)).log_det.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_exponential_scales_down_only():
    layer = ExponentialConv2d(2).double()
    torch.testing.assert_close(layer.kernel(), layer.weight)  # starts below its bound
    with torch.no_grad():
        layer.weight.mul_(1e4)
    assert abs(spectral_norm_bound(layer.kernel()).item() - 0.9) < 1e-9


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelativeLinear(0), "features must be at least 1; got 0"),
        (lambda: PlainConv1x1(0), "channels must be at least 1; got 0"),
        (lambda: LUConv1x1(0), "channels must be at least 1; got 0"),
        (lambda: HouseholderConv1x1(0), "channels must be at least 1; got 0"),
        (lambda: HouseholderConv1x1(2, reflections=0), "reflections must be at least 1; got 0"),
        (lambda: EmergingConv2d(2, 4), "kernel_size must be odd.*got 4"),
        (lambda: EmergingConv2d(0), "channels must be at least 1; got 0"),
        (lambda: ExponentialConv2d(2, 2), "kernel_size must be odd.*got 2"),
        (lambda: ExponentialConv2d(2, norm_bound=0.0), r"norm_bound must be in \(0, 5\]; got 0.0"),
        (lambda: ExponentialConv2d(2, norm_bound=9.0), r"norm_bound must be in \(0, 5\]; got 9.0"),
        (lambda: RelativeLinear(3)(torch.zeros(2)), r"x must have shape \[..., D\] with D = 3"),
        (lambda: RelativeLinear(3).inverse(torch.zeros(2)), r"z must have shape \[..., D\]"),
        (lambda: ExactLinear(3)(torch.zeros(2)), r"x must have shape \[..., D\] with D = 3"),
        (lambda: ExactLinear(3).inverse(torch.zeros(2)), r"z must have shape \[..., D\]"),
        (lambda: EmergingConv2d(2).log_abs_det((0, 1)), "spatial_shape must be"),
        (lambda: ExponentialConv2d(2).log_abs_det((1,)), "spatial_shape must be"),
        *(
            (lambda make=make: make(2)(torch.zeros(1, 3, 4, 4)), "x must have shape .* C = 2")
            for make in (*GLOW, EmergingConv2d, ExponentialConv2d)
        ),
        *(
            (lambda make=make: make(2).inverse(torch.zeros(2, 4, 4)), "z must have shape .* C = 2")
            for make in (*GLOW, EmergingConv2d, ExponentialConv2d)
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
