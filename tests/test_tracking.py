"""Inverses that follow a weight: against dense least squares."""

from __future__ import annotations

import ground_truth
import numpy as np
import pytest
import torch

from snf_ext.tracking import fit_inverse_, least_squares_kernel, project_inverse_


def near_identity(*shape, groups=1, noise=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 2:
        return weight + torch.eye(*shape, dtype=torch.float64)
    return weight + torch.nn.init.dirac_(torch.empty_like(weight), groups)


# channels, groups, size of w, size of r, image, dilation, circular
KERNELS = {
    "3x3": (2, 1, (3, 3), (3, 3), (4, 5), 1, False),
    "larger": (2, 1, (3, 3), (5, 7), (6, 5), 1, False),
    "smaller": (1, 1, (5, 3), (3, 1), (4, 6), 1, False),
    "1x1": (3, 1, (1, 1), (1, 1), (2, 3), 1, False),
    "groups": (4, 2, (3, 3), (3, 5), (5, 4), 1, False),
    "depthwise": (3, 3, (3, 3), (3, 3), (4, 4), 1, False),
    "dilation": (2, 1, (3, 3), (3, 3), (6, 5), 2, False),
    "circular": (2, 1, (3, 3), (3, 5), (6, 7), 1, True),
    "circular-groups": (4, 2, (3, 3), (5, 3), (5, 6), 1, True),
    "one-row": (2, 1, (3, 3), (3, 3), (1, 6), 1, False),
    "one-pixel": (2, 1, (3, 3), (5, 5), (1, 1), 1, False),
    "circular-wraps": (1, 1, (3, 3), (5, 5), (3, 2), 1, True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_least_squares_kernel(name):
    """The residual of the closed form is the least of all, by numpy's dense least squares."""
    channels, groups, size_w, size_r, image, dilation, circular = KERNELS[name]
    per_group = channels // groups
    weight = near_identity(channels, per_group, *size_w, groups=groups)
    geometry = (dilation, groups, circular)
    got = least_squares_kernel(weight, size_r, image, *geometry)
    shape = (channels, per_group, *size_r)
    assert got.shape == shape
    matrix = ground_truth.conv_matrix(weight, image, *geometry)
    columns = []
    for index in range(got.numel()):
        unit = np.zeros(got.numel())
        unit[index] = 1
        columns.append(ground_truth.conv_matrix(unit.reshape(shape), image, *geometry) @ matrix)
    design = np.stack([column.ravel() for column in columns], 1)
    identity = np.eye(len(matrix)).ravel()
    want = np.linalg.lstsq(design, identity, rcond=None)[0]
    # As matrices, which are unique: circular taps that wrap onto each other share one value.
    np.testing.assert_allclose(design @ got.numpy().ravel(), design @ want, atol=1e-7)


def test_least_squares_kernel_of_what_a_kernel_can_invert():
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = -4.0
    found = least_squares_kernel(weight, (3, 3), (5, 5))
    want = torch.zeros(1, 1, 3, 3)
    want[0, 0, 1, 1] = -0.25
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


def test_singular_weights_give_finite_inverses():
    zero = torch.zeros(2, 2, 3, 3)
    assert torch.equal(least_squares_kernel(zero, (3, 3), (5, 5)), zero)
    one_sided = torch.zeros(2, 2, 1, 1)
    one_sided[0, 0] = 2.0
    found = least_squares_kernel(one_sided, (1, 1), (3, 3))[:, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), atol=1e-6, rtol=0)
    inverse = torch.eye(3)
    project_inverse_(inverse, torch.zeros(3, 3), torch.randn(2, 3))
    fit_inverse_(inverse, torch.zeros(3, 3))
    assert torch.equal(inverse, torch.eye(3))


def test_projection_is_the_smallest_change_that_is_right_on_the_directions():
    weight = near_identity(9, 9)
    inverse, directions = near_identity(9, 9, seed=1), near_identity(4, 9, seed=2, noise=1.0)
    v, w, r = directions.numpy().T, weight.numpy(), inverse.numpy().copy()
    project_inverse_(inverse, weight, directions)
    got = inverse.numpy()
    np.testing.assert_allclose(got @ w @ v, v, atol=1e-10)
    # The smallest change has its rows in the span of what the directions become.
    y = w @ v
    want = r + (v - r @ y) @ np.linalg.pinv(y)
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_projections_converge_to_the_inverse():
    weight, inverse = near_identity(20, 20, noise=0.1), torch.zeros(20, 20, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        directions = torch.randn(8, 20, generator=generator, dtype=torch.float64)
        project_inverse_(inverse, weight, directions)
    np.testing.assert_allclose(inverse.numpy(), np.linalg.inv(weight.numpy()), atol=1e-6)
