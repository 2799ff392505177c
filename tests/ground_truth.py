"""The layers' outputs and gradients from dense float64 matrices, written from the equations.

Nothing here uses the package: matrices are filled element by element in numpy, and the gradient of
a kernel element is the sum of the dense gradient over the places where that element stands.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    z: np.ndarray
    recon: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dweight_inv: np.ndarray
    dbias: np.ndarray


def places(shape, size, dilation, groups, circular):
    """(row, column, kernel index) for every element of a convolution's matrix."""
    channels, per_group, kernel_rows, kernel_columns = shape
    height, width = size
    for o in range(channels):
        for i in range(per_group):
            source = o // per_group * per_group + i
            for a in range(kernel_rows):
                for b in range(kernel_columns):
                    for h in range(height):
                        for w in range(width):
                            y = h + (a - kernel_rows // 2) * dilation
                            x = w + (b - kernel_columns // 2) * dilation
                            if circular:
                                y, x = y % height, x % width
                            elif not (0 <= y < height and 0 <= x < width):
                                continue
                            yield (
                                (o * height + h) * width + w,
                                (source * height + y) * width + x,
                                (o, i, a, b),
                            )


def conv_matrix(kernel, size, dilation=1, groups=1, circular=False):
    kernel = np.asarray(kernel, dtype=np.float64)
    dimension = kernel.shape[0] * size[0] * size[1]
    matrix = np.zeros((dimension, dimension))
    for row, column, element in places(kernel.shape, size, dilation, groups, circular):
        matrix[row, column] += kernel[element]
    return matrix


def onto_kernel(matrix, shape, size, dilation, groups, circular):
    """The dense gradient summed over the places of each kernel element."""
    gradient = np.zeros(shape)
    for row, column, element in places(shape, size, dilation, groups, circular):
        gradient[element] += matrix[row, column]
    return gradient


def dense(
    x,
    weight,
    weight_inv,
    bias,
    grad_z,
    grad_log_det,
    grad_recon,
    reconstruct=True,
    penalty_share=1.0,
) -> Truth:
    """The one equation set on matrices; all of x, bias, grad_z are (B, D)."""
    y = x @ weight.T
    if not reconstruct:
        dweight = grad_z.T @ x + grad_log_det.sum() * weight_inv.T
        recon, dweight_inv = np.zeros(len(x)), np.zeros_like(weight_inv)
        return Truth(y + bias, recon, grad_z @ weight, dweight, dweight_inv, grad_z.sum(0))
    error = y @ weight_inv.T - x
    total = grad_log_det.sum()
    dx = grad_z @ weight
    pull = 2 * grad_recon[:, None] * error
    delta = grad_z / 2 + penalty_share * pull @ weight_inv
    dweight = delta.T @ x + total / 2 * weight_inv.T
    dweight_inv = (pull - dx / 2).T @ y - total / 2 * weight.T
    return Truth(y + bias, (error**2).sum(1), dx, dweight, dweight_inv, grad_z.sum(0))


def linear(x, weight, weight_inv, bias, grad_z, grad_log_det, grad_recon, **rule) -> Truth:
    args = [x, weight, weight_inv, bias, grad_z, grad_log_det, grad_recon]
    args[3] = np.zeros(x.shape[1]) if bias is None else bias
    return dense(*(np.asarray(a, dtype=np.float64) for a in args), **rule)


def conv2d(
    x,
    weight,
    weight_inv,
    bias,
    grad_z,
    grad_log_det,
    grad_recon,
    dilation=1,
    groups=1,
    circular=False,
    **rule,
) -> Truth:
    x, weight, weight_inv, grad_z, grad_log_det, grad_recon = (
        np.asarray(a, dtype=np.float64)
        for a in (x, weight, weight_inv, grad_z, grad_log_det, grad_recon)
    )
    batch, channels, height, width = x.shape
    geometry = ((height, width), dilation, groups, circular)
    flat_bias = np.zeros(channels) if bias is None else np.asarray(bias, dtype=np.float64)
    truth = dense(
        x.reshape(batch, -1),
        conv_matrix(weight, *geometry),
        conv_matrix(weight_inv, *geometry),
        np.repeat(flat_bias, height * width),
        grad_z.reshape(batch, -1),
        grad_log_det,
        grad_recon,
        **rule,
    )
    return Truth(
        truth.z.reshape(x.shape),
        truth.recon,
        truth.dx.reshape(x.shape),
        onto_kernel(truth.dweight, weight.shape, *geometry),
        onto_kernel(truth.dweight_inv, weight_inv.shape, *geometry),
        truth.dbias.reshape(channels, -1).sum(1),
    )
