"""Glow's 1x1 convolutions: one C x C matrix mixes the channels of every pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import exact
from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from .conv_shape import ConvShape, image_size


class _Conv1x1(Bijection):
    """``z = W x + c`` at each pixel; a subclass says what W is.

    W is made, and its determinant taken, in float32 at least.
    """

    mixing = True
    bias: nn.Parameter | None

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.shape = ConvShape.checked(channels, 1, 1, 1, "zeros", 1)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def matrix(self) -> Tensor:
        """W, ``(C, C)``, with its gradient."""
        raise NotImplementedError

    def _matrix_log_abs_det(self) -> Tensor:
        raise NotImplementedError

    def _solve(self, columns: Tensor) -> Tensor:
        """``W^-1 columns``, shapes ``(C, N)``."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        self.shape.check_image(x, "x")
        z = F.conv2d(x, self.matrix().to(x.dtype)[:, :, None, None], self.bias)
        zeros = per_sample_zeros(x)
        return FlowStep(z, zeros + self.log_abs_det((x.shape[2], x.shape[3])), zeros)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        """The solution of ``W x = z - c`` at each pixel, exact in either case.

        Raises:
            ValueError: z is not ``(B, C, H, W)``, or W is singular.
        """
        self.shape.check_image(z, "z")
        y = z if self.bias is None else z - self.bias[:, None, None]
        columns = y.transpose(0, 1).flatten(1)
        solved = self._solve(columns.to(wide_dtype(columns.dtype))).to(y.dtype)
        return solved.unflatten(1, (z.shape[0], *z.shape[2:])).transpose(0, 1)

    def log_abs_det(self, spatial_shape: tuple[int, int]) -> Tensor:
        """``H W log |det W|`` in nats on ``(H, W)`` images, a scalar with its exact gradient."""
        height, width = image_size(spatial_shape)
        return height * width * self._matrix_log_abs_det()

    def extra_repr(self) -> str:
        return f"{self.shape.channels}, bias={self.bias is not None}"


class PlainConv1x1(_Conv1x1):
    """1x1 convolution ``z = W x + c`` whose ``log |det W|`` is differentiated exactly.

    Shapes: x ``(B, C, H, W)``, z the same, ``log_det`` and ``recon`` (zeros) ``(B,)``.

    Args:
        channels: C.
        bias: whether there is a c.

    Parameters: ``weight`` W ``(C, C)``, started at a random orthogonal matrix; ``bias`` c ``(C,)``,
    started at 0, or None.

    Cost: O(B H W C^2 + C^3) a step. Source: Kingma and Dhariwal 2018, "Glow", section 3.2.

    >>> layer = PlainConv1x1(3)
    >>> z, log_det, recon = layer(torch.randn(2, 3, 4, 5))
    >>> z.shape, log_det.abs().max().item() < 1e-4
    (torch.Size([2, 3, 4, 5]), True)
    """

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__(channels, bias)
        self.weight = nn.Parameter(_orthogonal(channels))
        self._cache = exact.FactorizationCache()

    def matrix(self) -> Tensor:
        return self.weight

    def _matrix_log_abs_det(self) -> Tensor:
        wide = wide_dtype(self.weight.dtype)
        if exact.differentiates(self.weight):
            return exact.linear_log_abs_det(self.weight.to(wide))
        return self._factorization().log_abs_det.to(wide)

    def _solve(self, columns: Tensor) -> Tensor:
        return self._factorization().solve(columns.T).T

    def _factorization(self) -> exact.Factorization:
        return exact.factorized(self._cache, self.weight)


class LUConv1x1(_Conv1x1):
    """1x1 convolution ``z = W x + c`` with ``W = P L (U + diag s)``; ``log |det W| = sum log_s``.

    P, a permutation, and the signs of s stay as they start; L has ones on its diagonal.
    Shapes as in :class:`PlainConv1x1`.

    Args:
        channels: C.
        bias: whether there is a c.

    Parameters: ``lu`` ``(C, C)``, L below and U above the diagonal, which is not read;
    ``log_s`` ``(C,)``, ``s = sign exp(log_s)``; ``bias`` c ``(C,)`` or None.
    Buffers: ``permutation`` ``(C,)``, row i of W is row ``permutation[i]`` of the rest; ``sign``.
    They start at the factors of a random orthogonal matrix, c at 0.

    Cost: O(B H W C^2 + C^3) a step, the second part one product; the inverse takes two
    triangular solves. Source: Kingma and Dhariwal 2018, "Glow", section 3.2.

    >>> layer = LUConv1x1(3)
    >>> x = torch.randn(2, 3, 4, 5)
    >>> torch.allclose(layer.inverse(layer(x).z), x, atol=1e-4)
    True
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__(channels, bias)
        permutation, lower, upper = torch.linalg.lu(_orthogonal(channels))
        s = upper.diagonal()
        self.lu = nn.Parameter(lower.tril(-1) + upper.triu(1))
        self.log_s = nn.Parameter(s.abs().log())
        self.register_buffer("permutation", permutation.argmax(1))
        self.register_buffer("sign", s.sign())

    def _factors(self) -> tuple[Tensor, Tensor]:
        lu = self.lu.to(wide_dtype(self.lu.dtype))
        diagonal = self.sign.to(lu) * self.log_s.to(lu).exp()
        identity = torch.eye(self.shape.channels, dtype=lu.dtype, device=lu.device)
        return lu.tril(-1) + identity, lu.triu(1) + diagonal.diag_embed()

    def matrix(self) -> Tensor:
        lower, upper = self._factors()
        return (lower @ upper)[self.permutation]

    def _matrix_log_abs_det(self) -> Tensor:
        return self.log_s.to(wide_dtype(self.log_s.dtype)).sum()

    def _solve(self, columns: Tensor) -> Tensor:
        lower, upper = (factor.to(columns.dtype) for factor in self._factors())
        rows = columns[self.permutation.argsort()]
        half = torch.linalg.solve_triangular(lower, rows, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True)


class HouseholderConv1x1(_Conv1x1):
    """1x1 convolution ``z = W x + c`` with W a product of reflections, so that its log-det is 0.

    ``W = H_1 H_2 ... H_n`` with ``H_i = I - 2 v_i v_i' / |v_i|^2``, an orthogonal matrix.
    Shapes as in :class:`PlainConv1x1`.

    Args:
        channels: C.
        bias: whether there is a c.
        reflections: n; C if None, which reaches every orthogonal matrix of determinant
            ``(-1)^C``.

    Parameters: ``vectors`` v ``(n, C)``, started at standard normal noise; ``bias`` c ``(C,)``,
    started at 0, or None.

    Cost: O(B H W C^2 + C^2 n) a step: the reflections are multiplied at once,
    ``W = I - V' T V`` with a triangular T (Schreiber and Van Loan 1989, "A storage-efficient WY
    representation"). Source: Tomczak and Welling 2016, "Improving variational auto-encoders using
    Householder flow".

    >>> layer = HouseholderConv1x1(3)
    >>> torch.allclose(layer.matrix() @ layer.matrix().T, torch.eye(3), atol=1e-5)
    True
    """

    def __init__(self, channels: int, *, bias: bool = True, reflections: int | None = None) -> None:
        super().__init__(channels, bias)
        count = channels if reflections is None else reflections
        if count < 1:
            raise ValueError(f"reflections must be at least 1; got {count}")
        self.vectors = nn.Parameter(torch.randn(count, channels))

    def matrix(self) -> Tensor:
        v = F.normalize(self.vectors.to(wide_dtype(self.vectors.dtype)), dim=1)
        identity = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        half = 0.5 * torch.eye(v.shape[0], dtype=v.dtype, device=v.device)
        gram = (v @ v.T).triu(1) + half  # the inverse of T
        return identity - v.T @ torch.linalg.solve_triangular(gram, v, upper=True)

    def _matrix_log_abs_det(self) -> Tensor:
        return self.vectors.new_zeros((), dtype=wide_dtype(self.vectors.dtype))

    def _solve(self, columns: Tensor) -> Tensor:
        return self.matrix().to(columns.dtype).T @ columns

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={self.vectors.shape[0]}"


def _orthogonal(channels: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(channels, channels))
