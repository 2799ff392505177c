"""The substitution: every backend against dense float64 matrices, and its gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import ground_truth
import numpy as np
import pytest
import torch
from conftest import needs_native

import snf_ext
from snf_ext import ops, reference

either_way = pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])

# batch, (channels, height, width), kernel
SHAPES = [
    (3, (2, 4, 5), (2, 2)),
    (1, (1, 1, 1), (1, 1)),
    (2, (3, 1, 6), (2, 3)),
    (2, (3, 6, 1), (3, 2)),
    (5, (2, 2, 3), (4, 5)),  # larger than the image
    (19, (1, 5, 4), (3, 1)),  # more images than lanes
    (2, (19, 3, 2), (2, 2)),  # blocks of 8, of 2 and of 1 channels
    (1, (70, 2, 2), (2, 1)),  # more channels than a warp has lanes
    (0, (2, 3, 3), (2, 2)),
]


def problem(batch, shape, kernel, dtype=torch.float64, seed=0, device="cpu"):
    """z, and a weight with a diagonal near one and numbers where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[0]
    weight = torch.randn(channels, channels, *kernel, generator=generator, dtype=torch.float64)
    weight *= 0.5 / (channels * np.prod(kernel)) ** 0.5
    for own in (weight[:, :, 0, 0], weight[:, :, -1, -1]):
        own.diagonal().copy_(1 + 0.5 * torch.rand(channels, generator=generator).double())
    z = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return z.to(device, dtype), weight.to(device, dtype)


def dense(weight, size, upper):
    """The matrix of the odd kernel that the quadrant is a part of, its own tap masked by hand."""
    kernel = weight.double().numpy().copy()
    rows, columns = kernel.shape[2] - 1, kernel.shape[3] - 1
    own = kernel[:, :, 0, 0] if upper else kernel[:, :, -1, -1]
    own[:] = np.triu(own) if upper else np.tril(own)
    before, after = (rows, 0), (columns, 0)
    pads = (before, after) if upper else (before[::-1], after[::-1])
    return ground_truth.conv_matrix(np.pad(kernel, ((0, 0), (0, 0), *pads)), size)


def limit(dtype):
    return {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@either_way
def test_solution_is_that_of_the_dense_system(backend, upper, case, dtype, device):
    z, weight = problem(*case, dtype)
    x = ops.triangular_conv2d_solve(z.to(device), weight.to(device), upper).cpu()
    assert (x.dtype, x.shape) == (dtype, z.shape)
    right = z.double().flatten(1).numpy()
    want = np.linalg.solve(dense(weight, case[1][1:], upper), right.T).T
    error = np.abs(x.double().flatten(1).numpy() - want).max(initial=0)
    assert error <= limit(dtype) * (1 + np.abs(want).max(initial=0))


@either_way
def test_convolution_is_the_dense_product(upper):
    z, weight = problem(2, (3, 4, 5), (3, 2))
    masked = reference.triangular.triangular_mask(weight, upper)
    got = reference.triangular.triangular_conv2d(z, masked, upper)
    want = z.flatten(1).numpy() @ dense(weight, (4, 5), upper).T
    np.testing.assert_allclose(got.flatten(1).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("case", [((2, 3, 2), (2, 2)), ((1, 2, 3), (3, 4))], ids=str)
@either_way
def test_gradients(backend, upper, case):
    z, weight = problem(2, *case)
    leaves = (z.requires_grad_(), weight.requires_grad_())

    def solve(z_, weight_):
        return ops.triangular_conv2d_solve(z_, weight_, upper)

    assert torch.autograd.gradcheck(solve, leaves)
    assert torch.autograd.gradgradcheck(solve, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@either_way
def test_half_precision_is_widened(backend, upper, dtype, device):
    """Rounded once: the float32 solution of the rounded problem."""
    z, weight = problem(3, (4, 3, 4), (2, 2), dtype, device=device)
    got = ops.triangular_conv2d_solve(z, weight, upper)
    want = ops.triangular_conv2d_solve(z.float(), weight.float(), upper)
    assert torch.equal(got, want.to(dtype))


def test_strides_do_not_matter(backend, device):
    z, weight = problem(3, (4, 3, 5), (2, 2), device=device)
    want = ops.triangular_conv2d_solve(z, weight)
    far = torch.stack([z, z], -1)[..., 0], torch.stack([weight, weight], -1)[..., 0]
    torch.testing.assert_close(ops.triangular_conv2d_solve(*far), want)
    last = z.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.triangular_conv2d_solve(last, weight), want)


@either_way
def test_a_zero_on_the_diagonal_is_not_hidden(backend, upper, device):
    z, weight = problem(2, (2, 3, 3), (2, 2), device=device)
    (weight[:, :, 0, 0] if upper else weight[:, :, -1, -1])[1, 1] = 0
    x = ops.triangular_conv2d_solve(z, weight, upper)
    assert not torch.isfinite(x[:, 1]).any()


@pytest.mark.parametrize(
    ("z", "weight", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 2).long(), (1, 1, 2, 2), TypeError, "z must be a floating-point"),
        (torch.zeros(1, 2, 2), (2, 2, 2, 2), ValueError, r"z must have shape \[B, C, H, W\]; got"),
        (
            torch.zeros(1, 2, 0, 2),
            (2, 2, 2, 2),
            ValueError,
            "z must have at least one channel and pixel; got",
        ),
        (
            torch.zeros(1, 2, 2, 2),
            (2, 1, 2, 2),
            ValueError,
            r"weight must have shape \[C, C, kh, kw\] = \[2, 2, kh, kw\]; got \[2, 1, 2, 2\]",
        ),
        (torch.zeros(1, 2, 2, 2), (2, 2), ValueError, r"weight must have .* got \[2, 2\]"),
        (
            torch.zeros(1, 2, 2, 2).double(),
            (2, 2, 2, 2),
            TypeError,
            "weight must have the dtype of z, torch.float64; got torch.float32",
        ),
    ],
)
def test_bad_arguments(backend, z, weight, error, message):
    with pytest.raises(error, match=message):
        ops.triangular_conv2d_solve(z, torch.zeros(weight))


@needs_native
def test_operator_is_registered_as_torch_wants(device):
    z, weight = problem(2, (2, 3, 3), (2, 2), device=device)
    torch.library.opcheck(
        torch.ops.snf_ext.triangular_conv2d_solve,
        (z.requires_grad_(), weight.requires_grad_(), True),
    )


CAPABILITY = """
import torch, snf_ext
g = torch.Generator().manual_seed(0)
z = torch.randn(37, 11, 5, 6, generator=g)
w = 0.05 * torch.randn(11, 11, 3, 2, generator=g)
w[:, :, -1, -1] += torch.eye(11)
torch.set_num_threads(3)
three = snf_ext.ops.triangular_conv2d_solve(z, w)
torch.set_num_threads(1)
one = snf_ext.ops.triangular_conv2d_solve(z, w)
assert torch.equal(three, one)
want = snf_ext.reference.triangular_conv2d_solve(z.double(), w.double())
assert (one - want).abs().max() < 1e-5 * want.abs().max()
print(snf_ext.build_info()["cpu_capability"])
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_and_number_of_threads_cpu_only(capability):
    env = os.environ | {"SNF_EXT_CPU_CAPABILITY": capability}
    said = subprocess.run(
        [sys.executable, "-c", CAPABILITY], env=env, capture_output=True, text=True, timeout=120
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() in ("baseline", capability, "avx2")


def test_gradients_flow_through_the_inverse_of_the_layer(backend):
    layer = snf_ext.EmergingConv2d(2).double()
    z = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    leaves = tuple(p.detach().clone().requires_grad_() for p in (layer.lower, layer.upper))

    def inverse(lower, upper):
        weights = {"layer.lower": lower, "layer.upper": upper}
        return torch.func.functional_call(Inverse(layer), weights, (z,))

    assert torch.autograd.gradcheck(inverse, leaves)


class Inverse(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer.inverse(z)
