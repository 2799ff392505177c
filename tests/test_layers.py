"""What is particular to single layers: constructors, starts, and their errors."""

from __future__ import annotations

import math

import ground_truth
import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import SelfNormConv2d, SelfNormLinear


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SelfNormLinear(0), ValueError, "features must be at least 1; got 0"),
        (lambda: SelfNormConv2d(3, 2), ValueError, "kernel_size must be odd.*Squeeze.*got 2"),
        (lambda: SelfNormConv2d(3, (3, 0)), ValueError, r"kernel_size must be odd.*got \(3, 0\)"),
        (lambda: SelfNormConv2d(0, 3), ValueError, "channels must be at least 1; got 0"),
        (lambda: SelfNormConv2d(3, 3, groups=2), ValueError, "groups must divide .* C = 3; got 2"),
        (
            lambda: SelfNormConv2d(3, 3, dilation=0),
            ValueError,
            r"dilation must be in \[1, 2\^31\); got 0",
        ),
        (
            lambda: SelfNormConv2d(3, 3, padding_mode="reflect"),
            ValueError,
            "padding_mode must be 'zeros' or 'circular'; got 'reflect'",
        ),
        (
            lambda: SelfNormConv2d(3, 3, inverse_kernel_size=4),
            ValueError,
            "inverse_kernel_size must be odd",
        ),
        (lambda: SelfNormConv2d(3, 3, stride=2), NotImplementedError, "stride must be 1.*Squeeze"),
        (lambda: snf_ext.ExactConv2d(3, 4), ValueError, "kernel_size must be odd"),
        (lambda: snf_ext.SmoothLeakyReLU(0.0), ValueError, r"alpha must be in \(0, 1\]; got 0.0"),
        (lambda: snf_ext.Logit(0.5), ValueError, r"alpha must be in \[0, 0.5\); got 0.5"),
        (lambda: snf_ext.Normalize(1.0, 0.0), ValueError, "scale must not be 0"),
        (lambda: snf_ext.Dequantize(0), ValueError, "levels must be at least 1; got 0"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SelfNormLinear(3)(torch.zeros(2, 4)), ValueError, "x must have shape .* D = 3"),
        (
            lambda: SelfNormLinear(3)(torch.zeros(2, 3, dtype=torch.long)),
            TypeError,
            "x must be a floating-point tensor; got torch.int64",
        ),
        (lambda: SelfNormLinear(3).inverse(torch.zeros(2)), ValueError, "z must have shape"),
        (lambda: SelfNormConv2d(2, 3)(torch.zeros(2, 4, 4)), ValueError, "x must have shape"),
        (
            lambda: SelfNormConv2d(2, 3).inverse(torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"z must have shape \[B, C, H, W\] with C = 2; got \[1, 3, 4, 4\]",
        ),
        (lambda: SelfNormConv2d(2, 3).log_abs_det((4,)), ValueError, "spatial_shape must be"),
        (lambda: SelfNormConv2d(2, 3).log_abs_det((0, 4)), ValueError, "spatial_shape must be"),
        (lambda: snf_ext.Squeeze()(torch.zeros(1, 1, 3, 4)), ValueError, "even H and W"),
        (lambda: snf_ext.Flatten((2, 3))(torch.zeros(1, 3, 2)), ValueError, r"events \[2, 3\]"),
    ],
)
def test_bad_input(call, error, message, backend):
    with pytest.raises(error, match=message):
        call()


def test_linear_takes_any_leading_shape(backend, device):
    layer = SelfNormLinear(4).eval().to(device)
    for shape in ((4,), (3, 4), (2, 3, 4), (0, 4)):
        z, log_det, recon = layer(torch.randn(shape, device=device))
        assert z.shape == shape
        assert log_det.shape == recon.shape == shape[:-1]
        assert layer.inverse(z, exact=True).shape == shape


def test_starts_near_the_identity_with_the_transpose_as_inverse():
    linear = SelfNormLinear(50)
    noise = linear.weight - torch.eye(50)
    assert 0.5 < noise.std() / (0.01 * math.sqrt(2 / 100)) < 1.5
    assert torch.equal(linear.weight_inv, linear.weight.T)
    conv = SelfNormConv2d(4, 3, groups=2)
    matrix = ground_truth.conv_matrix(conv.weight.detach(), (5, 4), groups=2)
    inverse = ground_truth.conv_matrix(conv.weight_inv.detach(), (5, 4), groups=2)
    assert np.array_equal(inverse, matrix.T)
    assert np.abs(matrix - np.eye(80)).max() < 0.1


@pytest.mark.parametrize("inverse_size", [1, 5, (3, 7)])
def test_asymmetric_inverse_starts_at_the_cropped_or_padded_transpose(inverse_size):
    conv = SelfNormConv2d(2, 3, inverse_kernel_size=inverse_size)
    same = conv.weight.flip(2, 3).transpose(0, 1)
    rows, columns = conv.weight_inv.shape[2:]
    padded = torch.zeros(2, 2, 9, 9)
    padded[:, :, 3:6, 3:6] = same
    top, left = (9 - rows) // 2, (9 - columns) // 2
    assert torch.equal(conv.weight_inv, padded[:, :, top : top + rows, left : left + columns])


def test_learned_inverse_is_the_convolution_by_weight_inv(backend, device):
    conv = SelfNormConv2d(2, 3, inverse_kernel_size=5, padding_mode="circular").double()
    z = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    matrix = ground_truth.conv_matrix(conv.weight_inv.detach(), (4, 6), circular=True)
    want = (z - conv.bias[:, None, None]).flatten(1).detach().numpy() @ matrix.T
    got = conv.to(device).inverse(z.to(device)).detach().cpu()
    np.testing.assert_allclose(got.flatten(1), want, atol=1e-12)


def test_smooth_leaky_relu_at_the_extremes():
    f = snf_ext.SmoothLeakyReLU(0.3)
    x = torch.tensor([[-1e4, -50.0, -1e-8, 0.0, 1e-8, 30.0, 39.999, 40.001, 50.0, 1e4]]).double()
    z, log_det, _ = f(x)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(f.inverse(z), x, rtol=1e-12, atol=1e-12)


def test_logit_at_the_ends_of_the_interval():
    f = snf_ext.Logit(1e-6)
    z, log_det, _ = f(torch.tensor([[0.0, 1.0]]))
    end = math.log(1e-6) - math.log1p(-1e-6)
    torch.testing.assert_close(z, torch.tensor([[end, -end]]))
    assert torch.isfinite(log_det).all()


def test_dequantize_stays_in_its_cell():
    images = torch.randint(0, 256, (50, 20), dtype=torch.uint8)
    f = snf_ext.Dequantize()
    z = f(images).z
    assert z.dtype == torch.float32
    noise = z - images
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert 0.4 < noise.mean() < 0.6
    assert torch.equal(f.inverse(z), images.float())
    assert f.inverse(torch.tensor([[-3.0, 300.0]])).tolist() == [[0.0, 255.0]]


def test_exact_layers_have_the_exact_gradient(device):
    conv = snf_ext.ExactConv2d(2, 3, padding_mode="circular").double().to(device)
    conv.log_abs_det((3, 4)).backward()
    matrix = ground_truth.conv_matrix(conv.weight.detach().cpu(), (3, 4), circular=True)
    want = ground_truth.onto_kernel(np.linalg.inv(matrix).T, conv.weight.shape, (3, 4), 1, 1, True)
    np.testing.assert_allclose(conv.weight.grad.cpu(), want, atol=1e-10)
    with torch.no_grad():
        value = conv.log_abs_det((3, 4)).item()
    assert abs(value - np.linalg.slogdet(matrix)[1]) < 1e-10
