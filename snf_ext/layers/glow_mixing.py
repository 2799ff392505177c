"""Glow's 1x1 convolutions: one C x C matrix mixes the channels of every pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import exact
from ..bijection import Bijection, FlowStep, per_sample_zeros, wide_dtype
from ..own_parameters import assign_
from ..reference.autocast import without_autocast
from .conv_shape import ConvShape, image_size
from .initial import random_orthogonal


class _Conv1x1(Bijection):
    """``z = W x + c`` at each pixel; a subclass says what W is.

    W is made, its determinant taken and its inverse applied in float32 at least.
    """

    mixing = True
    bias: nn.Parameter | None

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.shape = ConvShape.checked(channels, 1, 1, 1, "zeros", 1)
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: W as the layer says, c = 0."""
        self._reset_matrix()
        if self.bias is not None:
            self.bias.zero_()

    def _reset_matrix(self) -> None:
        raise NotImplementedError

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
        with without_autocast(x.device):  # rounded, W would not be what its log_det is of
            matrix = self.matrix().to(x.dtype)
        z = F.conv2d(x, matrix[:, :, None, None], self.bias)
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
        with without_autocast(z.device):
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
        self.weight = nn.Parameter(torch.empty(channels, channels))
        self._cache = exact.FactorizationCache()
        self.reset_parameters()

    def _reset_matrix(self) -> None:
        assign_(self.weight, random_orthogonal(self.shape.channels))

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

    _version = 2  # version 1 had L and U in two parameters
    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__(channels, bias)
        self.lu = nn.Parameter(torch.empty(channels, channels))
        self.log_s = nn.Parameter(torch.empty(channels))
        self.register_buffer("permutation", torch.empty(channels, dtype=torch.int64))
        self.register_buffer("sign", torch.empty(channels))
        self.reset_parameters()

    def _reset_matrix(self) -> None:
        permutation, lower, upper = torch.linalg.lu(random_orthogonal(self.shape.channels))
        s = upper.diagonal()
        assign_(self.lu, lower.tril(-1) + upper.triu(1))
        assign_(self.log_s, s.abs().log())
        self.permutation.copy_(permutation.argmax(1))
        self.sign.copy_(s.sign())

    def _migrate(self, state: dict[str, Any], prefix: str, version: int | None) -> None:
        lower, upper = prefix + "lower", prefix + "upper"
        if {lower, upper} <= state.keys():  # of version 1
            state[prefix + "lu"] = state.pop(lower).tril(-1) + state.pop(upper).triu(1)

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
        self.vectors = nn.Parameter(torch.empty(count, channels))
        self.reset_parameters()

    def _reset_matrix(self) -> None:
        assign_(self.vectors, torch.randn(self.vectors.shape))

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
