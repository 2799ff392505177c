"""The training step and samples of the paper's public code, composed of stock PyTorch operations.

This is the baseline that the native layers are compared with; the spline and the convolutional
model are in ``composed_conv``, Glow in ``composed_glow``. It follows the public code's manner:

- separate deltas: one weight gradient per term, nothing merged (ten products a layer and step);
- the multiplicity is found by convolving ones over the whole batch, in every step;
- the reconstruction penalty runs the layer again on a detached input and calls backward once per
  layer, apart from the backward of the loss;
- a fully connected layer is a 1x1 convolution on images of one pixel;
- the inverse term assumes a loss averaged over the batch, whatever its real scale;
- samples: noise of the D x D normal; the learned inverse of a fully connected layer is a matrix
  times a column for each sample, the inverse of an activation 100 steps of Newton's method.

Left out, so that the baseline is no slower than it has to be: the public code's cache of the
multiplicity (it never hits and keeps 128 batches alive), its extra copy of each flipped kernel, its
masking of NaN losses and its ``.item()`` in every step; the log-density of each sample's noise, and
what its splines compute of their slopes while sampling.

Source: Keller et al. 2021, "Self Normalizing Flows", equations 10, 11, 15-17, 20-22 and 27.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

__all__ = [
    "ComposedConv2d",
    "ComposedFC",
    "ComposedFlow",
    "ComposedLinear",
    "SmoothLeakyReLU",
    "base_distribution",
    "composed_backward",
]


def flip(kernel: Tensor) -> Tensor:
    """Kernel of the transposed convolution: both image axes reversed, channels swapped."""
    return kernel.flip(2, 3).transpose(0, 1)


def _input_gradient(delta: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        delta, x, weight, None, (1, 1), (padding,) * 2, (1, 1), False, (0, 0), 1,
        (True, False, False),
    )[0]  # fmt: skip


def _weight_gradient(delta: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        delta, x, weight, None, (1, 1), (padding,) * 2, (1, 1), False, (0, 0), 1,
        (False, True, False),
    )[1]  # fmt: skip


class _ComposedConv2d(torch.autograd.Function):
    """z = w * x + c, with the learned inverse's gradient of log|det| for a batch-mean loss."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_inv: Tensor, padding: int
    ) -> Tensor:
        z = F.conv2d(x, weight, bias, padding=padding)
        ctx.save_for_backward(x, weight, bias, weight_inv, z)
        ctx.padding = padding
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (delta_z,) = grad_outputs
        x, weight, bias, weight_inv, z = ctx.saved_tensors
        padding = ctx.padding

        ones = torch.ones_like
        multiplicity = _weight_gradient(ones(z), ones(x), weight, padding) / len(x)

        data = _weight_gradient(delta_z, x, weight, padding)
        grad_weight = (data - flip(weight_inv) * multiplicity) / 2

        delta_x = _input_gradient(delta_z, x, weight, padding)
        y = z if bias is None else z - bias.view(1, -1, 1, 1)
        data = _weight_gradient(delta_x, y, weight_inv, padding)
        grad_weight_inv = (flip(weight) * flip(multiplicity) - data) / 2

        grad_bias = None if bias is None else delta_z.flatten(2).sum(-1).sum(0)
        return delta_x, grad_weight, grad_bias, grad_weight_inv, None


class ComposedConv2d(nn.Module):
    """Self-normalizing convolution in the manner of the public code: stride 1, same size.

    ``forward`` maps (B, C, H, W) to z of the same shape and remembers its input;
    ``reconstruction_backward`` then adds the penalty's gradients to the weights.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__()
        shape = (channels, channels, kernel_size, kernel_size)
        weight = nn.init.dirac_(torch.empty(shape))
        weight += nn.init.xavier_normal_(torch.empty(shape), gain=0.01)
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(weight)
        self.weight_inv = nn.Parameter(flip(weight).contiguous())
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        return _ComposedConv2d.apply(x, self.weight, self.bias, self.weight_inv, self.padding)

    def inverse(self, z: Tensor) -> Tensor:
        """x by the learned inverse."""
        y = z if self.bias is None else z - self.bias.view(1, -1, 1, 1)
        return F.conv2d(y, self.weight_inv, padding=self.padding)

    def reconstruction_backward(self, recon_weight: float) -> Tensor:
        """Adds the gradients of recon_weight * mean_b |x_b - R W x_b|^2; returns that value."""
        x = self.input.detach()
        y = F.conv2d(x, self.weight, padding=self.padding)
        x_hat = F.conv2d(y, self.weight_inv, padding=self.padding)
        recon = (x - x_hat).pow(2).flatten(1).sum(-1)
        penalty = recon_weight * recon.mean()
        penalty.backward()
        return penalty.detach()


class ComposedLinear(ComposedConv2d):
    """Fully connected layer in the manner of the public code: a 1x1 convolution on (B, D, 1, 1)."""

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__(features, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(*x.shape, 1, 1)).flatten(1)

    def inverse(self, z: Tensor) -> Tensor:
        y = z if self.bias is None else z - self.bias
        return torch.matmul(self.weight_inv[:, :, 0, 0], y.unsqueeze(-1)).squeeze(-1)


def composed_backward(
    loss: Tensor, layers: Iterable[ComposedConv2d], recon_weight: float = 1.0
) -> None:
    """Backward of a batch-mean loss, then the reconstruction penalty layer by layer."""
    loss.backward()
    for layer in layers:
        layer.reconstruction_backward(recon_weight)


class SmoothLeakyReLU(nn.Module):
    """f(x) = a x + (1 - a) log(1 + e^x) and log f', as the public code composes them."""

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._value(x), self._slope(x).abs().log().flatten(1).sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(100):
            x = x - (self._value(x) - y) / self._slope(x).clamp(min=1e-2)
        return x

    def _value(self, x: Tensor) -> Tensor:
        softplus = torch.stack((torch.zeros_like(x), x)).logsumexp(0)
        return self.alpha * x + (1 - self.alpha) * softplus

    def _slope(self, x: Tensor) -> Tensor:
        return self.alpha + (1 - self.alpha) * torch.sigmoid(x)


def base_distribution(
    features: int,
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> torch.distributions.Distribution:
    """Standard normal over D features.

    "multivariate" holds a D x D covariance, as the public code does: each log_prob is a triangular
    solve, O(B D^2). "normal" is the same density at O(B D).
    """
    zeros = torch.zeros(features, device=device, dtype=dtype)
    if name == "multivariate":
        eye = torch.eye(features, device=device, dtype=dtype)
        return MultivariateNormal(zeros, eye, validate_args=False)
    if name == "normal":
        scalar = torch.distributions.Normal(zeros, torch.ones_like(zeros), validate_args=False)
        return torch.distributions.Independent(scalar, 1, validate_args=False)
    raise ValueError(f"base must be 'multivariate' or 'normal'; got {name!r}")


class ComposedFlow(nn.Module):
    """What the composed models share: images 0..255 in, log-likelihood and gradients out.

    Uniform dequantization, x / 256, the squeeze by 1e-6, logit. Every preprocessing step computes
    its own log-determinant. The squeeze is (x + a)(1 - 2a) with a = 1e-6, as in the public code,
    2 a^2 less than the package's a + (1 - 2a) x.

    Device and dtype are chosen here, once: a distribution does not follow ``to``.
    """

    def __init__(
        self,
        features: int,
        base: str,
        recon_weight: float,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        alpha = 1e-6
        self.base = base_distribution(features, base, device, dtype)
        self.recon_weight = recon_weight
        self.register_buffer("shifts", torch.tensor([0.0, -alpha], dtype=dtype))
        self.register_buffer("scales", torch.tensor([256.0, 1 / (1 - 2 * alpha)], dtype=dtype))

    def _preprocess(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.rand_like(x)
        log_det = x.new_zeros(len(x))
        for shift, scale in zip(self.shifts, self.scales, strict=True):
            x = (x - shift) / scale
            log_det = log_det - x[0].numel() * torch.log(scale)
        log_det = log_det + (-torch.log(x) - torch.log(1 - x)).flatten(1).sum(-1)
        return torch.log(x) - torch.log(1 - x), log_det

    def _push(self, x: Tensor, log_det: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """From preprocessed images (B, C, H, W) to z and log_det with what the layers add."""
        raise NotImplementedError

    def _log_prob(self, x: Tensor, exact: bool) -> Tensor:
        z, log_det = self._push(*self._preprocess(x), exact)
        return self.base.log_prob(z.flatten(1)) + log_det

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-likelihood of images x, (B, C, H, W) -> (B,), nats; dense determinants."""
        return self._log_prob(x, exact=True)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """``count`` images by the learned inverses."""
        return self.pull(self.base.sample((count,)))

    @torch.no_grad()
    def pull(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) from noise (B, D), by the learned inverses."""
        x = torch.sigmoid(self._pull(z))
        for shift, scale in zip(self.shifts.flip(0), self.scales.flip(0), strict=True):
            x = x * scale + shift
        return x.floor().clamp(0, 255)

    def _pull(self, z: Tensor) -> Tensor:
        """Back from z (B, D) to preprocessed images."""
        raise NotImplementedError

    def training_backward(self, x: Tensor) -> None:
        """Gradients of the mean negative log-likelihood and of the penalties."""
        loss = -self._log_prob(x, exact=False).sum() / len(x)
        layers = [m for m in self.modules() if isinstance(m, ComposedConv2d)]
        composed_backward(loss, layers, self.recon_weight)


class ComposedFC(ComposedFlow):
    """Fully connected flow in the manner of the public code.

    Linear layers with a smooth leaky ReLU between them, on images 0..255.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...] = (1, 28, 28),
        layers: int = 2,
        base: str = "multivariate",
        recon_weight: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        features = torch.Size(event_shape).numel()
        self.event_shape = event_shape
        super().__init__(features, base, recon_weight, device, dtype)
        self.linears = nn.ModuleList(ComposedLinear(features) for _ in range(layers))
        self.activation = SmoothLeakyReLU(0.3)
        self.to(device, dtype)

    def _push(self, x: Tensor, log_det: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if exact:
                log_det = log_det + torch.linalg.slogdet(linear.weight[:, :, 0, 0])[1]
            if i + 1 < len(self.linears):
                x, slope = self.activation(x)
                log_det = log_det + slope
        return x, log_det

    def _pull(self, z: Tensor) -> Tensor:
        x = z
        for i, linear in reversed(list(enumerate(self.linears))):
            x = linear.inverse(x)
            if i:
                x = self.activation.inverse(x)
        return x.view(len(x), *self.event_shape)
