"""The self-normalizing layers: unconstrained linear maps that learn their own inverse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import exact, ops, tracking
from ..bijection import FlowStep
from ..own_parameters import assign_
from ..reference.convolution import flip
from ..refine import checked_refine
from ..shard import leading
from .conv_shape import ConvShape, image_size, odd_pair
from .debias import Debias, scales_of, signs
from .initial import STARTS, checked_start, near_identity, resized
from .learned_inverse import LearnedInverse
from .upkeep import Tracked, Upkeep


class SelfNormLinear(LearnedInverse):
    """Unconstrained linear map ``z = W x + c`` of the last dimension, with a learned inverse R.

    Shapes: x ``(..., D)``, z the same, ``log_det`` and ``recon`` ``(...)``.

    Args:
        features: D.
        bias: whether there is a c.
        inverse: how R is kept: ``"penalty"``, the paper's way, ``"inverse-only"``, ``"symmetric"``,
            ``"tracked"``, or a :class:`Penalty` or :class:`Tracked` with other numbers.
        debias: K, or a :class:`Debias`: terms that correct the inverse term of W's gradient in
            training, with random signs from torch's generator; see :mod:`snf_ext.layers.debias`.

    Parameters: ``weight`` W and ``weight_inv`` R of ``(D, D)``, ``bias`` c of ``(D,)`` or None.
    W starts at the identity plus Xavier-normal noise of gain 0.01, R at W transposed, c at 0.

    Cost: six products of B D^2 in training; three, three of 32 D^2 and 8 D^2 more if R is tracked.
    O(D^3) once per weight for exact values.
    Source: Self Normalizing Flows, section 4.1, equations 10, 11 and A.1.

    >>> layer = SelfNormLinear(4)
    >>> z, log_det, recon = layer(torch.randn(7, 4))
    >>> z.shape, log_det.tolist() == [0.0] * 7
    (torch.Size([7, 4]), True)
    >>> layer.eval()(torch.randn(1, 4)).log_det.item() == layer.log_abs_det().item()
    True
    """

    event_dims = 1

    def __init__(
        self,
        features: int,
        bias: bool = True,
        *,
        inverse: str | Upkeep = "penalty",
        debias: int | Debias = 0,
    ) -> None:
        super().__init__(inverse, debias)
        if features < 1:
            raise ValueError(f"features must be at least 1; got {features}")
        self.features = features
        self.weight = nn.Parameter(torch.empty(features, features))
        self.weight_inv = self._inverse_of(self.weight.shape)
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: W near the identity, R = W', c = 0."""
        start = near_identity(self.weight.shape)
        assign_(self.weight, start)
        assign_(self.weight_inv, start.T)
        self._due.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def _operator(
        self,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        reconstruct: bool = True,
        penalty_share: float = 1.0,
    ) -> FlowStep:
        return FlowStep(*ops.snf_linear(x, weight, weight_inv, bias, reconstruct, penalty_share))

    def _interval(self) -> int:
        return max(1, self.features // 8)

    def _make_right_on(self, x: Tensor, how: Tracked) -> None:
        if how.samples and x.numel():
            x = leading(x, how.samples).reshape(-1, self.features)[: how.samples]
            tracking.project_inverse_(self.weight_inv.data, self.weight.data, x)

    @torch.no_grad()
    def fit_inverse(self, spatial_shape: tuple[int, ...] = ()) -> None:
        """Set R to the inverse of W; ``spatial_shape`` is for other layers to ask for.

        Raises:
            ValueError: W is singular.

        Cost: O(D^3).

        >>> layer = SelfNormLinear(3)
        >>> layer.fit_inverse()
        >>> torch.allclose(layer.weight_inv @ layer.weight, torch.eye(3), atol=1e-6)
        True
        """
        eye = torch.eye(self.features, dtype=self.weight.dtype, device=self.weight.device)
        self.weight_inv.data.copy_(self._factorization().solve(eye).T)

    def _what_the_inverse_lacks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = signs((self.debias.probes, self.features), self.weight)
        return ops.debias_linear(
            v, self.weight, self.weight_inv, scales_of(self.debias), self.gradient_share
        )

    def _factorization(self, x: Tensor | None = None) -> exact.Factorization:
        return exact.factorized(self._cache, self.weight)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        """``R (z - c)``, or with ``exact=True`` the solution of ``W x = z - c``.

        With ``refine=n`` the former, improved by at most n steps of :meth:`refine_inverse`.

        Raises:
            ValueError: z has another last dimension, ``exact`` and W is singular, ``refine`` is
                no int of at least 0 or goes with ``exact``.

        Warns:
            InverseNotConverged: refining makes the residual of a sample grow; its best iterate
                is given.
        """
        y = self._centred(z)
        if checked_refine(refine, exact):
            return self._refined(z, refine, repr(self)).x.to(z.dtype)
        if not exact:
            return self._learned(y)
        return self._factorization().solve(y.reshape(-1, self.features)).reshape(z.shape)

    def _centred(self, z: Tensor) -> Tensor:
        if z.dim() < 1 or z.shape[-1] != self.features:
            raise ValueError(
                f"z must have shape [..., D] with D = {self.features}; got {list(z.shape)}"
            )
        return z if self.bias is None else z - self.bias

    def _map(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight)

    def log_abs_det(self) -> Tensor:
        """Exact ``log |det W|`` in nats, a scalar without gradient; -inf if W is singular."""
        return self._factorization().log_abs_det.to(self.weight)

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"


class SelfNormConv2d(LearnedInverse):
    """Unconstrained convolution ``z = w * x + c`` that keeps the shape, with a learned inverse r.

    Stride 1, odd kernel, "same" padding. Shapes: x ``(B, C, H, W)``, z the same, ``log_det`` and
    ``recon`` ``(B,)``.

    Args:
        channels: C.
        kernel_size: of w; an odd int, or a pair.
        dilation: distance between the taps of w and of r, 1 to 2^31 - 1.
        groups: number of channel groups.
        bias: whether there is a c.
        padding_mode: ``"zeros"`` or ``"circular"``.
        inverse_kernel_size: of r; as w if None. A larger r inverts better (SNF A.4).
        stride: only 1; ``Squeeze`` changes the resolution.
        start: where w starts: ``"identity"``, Dirac plus Xavier-normal noise of gain 0.01, or
            ``"orthogonal"``, a random orthogonal matrix of the channels at the centre, and
            that noise at the other taps.
        inverse: how r is kept: ``"penalty"``, the paper's way, ``"inverse-only"``, ``"symmetric"``,
            ``"tracked"``, or a :class:`Penalty` or :class:`Tracked` with other numbers.
        debias: K, or a :class:`Debias`: terms that correct the inverse term of w's gradient in
            training, with random signs from torch's generator; see :mod:`snf_ext.layers.debias`.

    Parameters: ``weight`` w ``(C, C/groups, k, k)``, ``weight_inv`` r ``(C, C/groups, k', k')``,
    ``bias`` c ``(C,)`` or None. r starts at ``flip(w)`` (cropped or zero-padded), c at 0.

    Raises:
        ValueError: an even kernel, groups that do not divide the channels, unknown padding or
            start.
        NotImplementedError: a stride.

    Cost: six convolutions a training step; three, and one least-squares fit, if r is tracked. For
    exact values what :meth:`exact_plan` says, once per weight and image size. Source: Self
    Normalizing Flows, section 4.2, equations 15, 16, A.2 and A.4.

    >>> layer = SelfNormConv2d(2, 3, inverse_kernel_size=5)
    >>> z, log_det, recon = layer(torch.randn(7, 2, 4, 6))
    >>> z.shape, recon.shape, layer.weight_inv.shape
    (torch.Size([7, 2, 4, 6]), torch.Size([7]), torch.Size([2, 2, 5, 5]))
    >>> layer.log_abs_det((4, 6)).shape
    torch.Size([])
    """

    event_dims = 3

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        inverse_kernel_size: int | tuple[int, int] | None = None,
        stride: int = 1,
        start: str = "identity",
        inverse: str | Upkeep = "penalty",
        debias: int | Debias = 0,
    ) -> None:
        super().__init__(inverse, debias)
        self.start = checked_start(start)
        self.shape = ConvShape.checked(
            channels, kernel_size, dilation, groups, padding_mode, stride
        )
        inverse_size = self.shape.kernel_size
        if inverse_kernel_size is not None:
            inverse_size = odd_pair(inverse_kernel_size, "inverse_kernel_size")
        self.weight = nn.Parameter(torch.empty(self.shape.weight_shape()))
        self.weight_inv = self._inverse_of(self.shape.weight_shape(inverse_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: w near Dirac or orthogonal, r = flip(w), c = 0."""
        groups = self.shape.groups
        start, size = STARTS[self.start](self.weight.shape, groups), self.weight_inv.shape
        assign_(self.weight, start)
        assign_(self.weight_inv, resized(flip(start, groups), (size[2], size[3])))
        self._due.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def _operator(
        self,
        x: Tensor,
        weight: Tensor,
        weight_inv: Tensor,
        bias: Tensor | None,
        reconstruct: bool = True,
        penalty_share: float = 1.0,
    ) -> FlowStep:
        how = (*self.shape.geometry, reconstruct, penalty_share)
        return FlowStep(*ops.snf_conv2d(x, weight, weight_inv, bias, *how))

    def _interval(self) -> int:
        return max(1, self.weight_inv[0].numel() // 128)

    def _geometry(self) -> tuple[Any, ...]:
        return self._image, *self.shape.geometry

    @torch.no_grad()
    def fit_inverse(self, spatial_shape: tuple[int, int]) -> None:
        """Set r to the kernel that undoes w best on ``(H, W)`` images, by least squares.

        Raises:
            ValueError: ``spatial_shape`` is no pair of positive ints.

        Cost and equation: :func:`snf_ext.tracking.least_squares_kernel`.

        >>> layer = SelfNormConv2d(2, 3)
        >>> before = layer(torch.ones(1, 2, 4, 4)).recon.item()
        >>> layer.fit_inverse((4, 4))
        >>> layer(torch.ones(1, 2, 4, 4)).recon.item() < before
        True
        """
        size = (self.weight_inv.shape[2], self.weight_inv.shape[3])
        self.weight_inv.data.copy_(
            tracking.least_squares_kernel(
                self.weight, size, image_size(spatial_shape), *self.shape.geometry
            )
        )

    def _factorization(self, x: Tensor) -> exact.Factorization:
        return self._factorization_for((x.shape[2], x.shape[3]))

    def _what_the_inverse_lacks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = signs((self.debias.probes, *x.shape[1:]), self.weight)
        how = (*self.shape.geometry, scales_of(self.debias), self.gradient_share)
        return ops.debias_conv2d(v, self.weight, self.weight_inv, *how)

    def _factorization_for(self, spatial_shape: tuple[int, int]) -> exact.Factorization:
        geometry = (*spatial_shape, *self.shape.geometry)
        return exact.factorized(self._cache, self.weight, geometry)

    def inverse(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        """``r * (z - c)``, or with ``exact=True`` the solution of ``w * x = z - c``.

        With ``refine=n`` the former, improved by at most n steps of :meth:`refine_inverse`.

        Raises:
            ValueError: z is not ``(B, C, H, W)``, ``exact`` and the layer is singular,
                ``refine`` is no int of at least 0 or goes with ``exact``.

        Warns:
            InverseNotConverged: refining makes the residual of a sample grow; its best iterate
                is given.
        """
        y = self._centred(z)
        if checked_refine(refine, exact):
            return self._refined(z, refine, repr(self)).x.to(z.dtype)
        if not exact:
            return self._learned(y)
        return self._factorization(z).solve(y.flatten(1)).reshape(z.shape)

    def _centred(self, z: Tensor) -> Tensor:
        self.shape.check_image(z, "z")
        return z if self.bias is None else z - self.bias[:, None, None]

    def _map(self, weight: Tensor, x: Tensor) -> Tensor:
        return ops.convolve(x, weight, *self.shape.geometry)

    def log_abs_det(self, spatial_shape: tuple[int, int]) -> Tensor:
        """Exact ``log |det T(w)|`` in nats on ``(H, W)`` images, a scalar without gradient.

        -inf if the layer is singular. Raises ValueError unless ``spatial_shape`` is two positive
        ints.
        """
        size = image_size(spatial_shape)
        return self._factorization_for(size).log_abs_det.to(self.weight)

    def exact_plan(self, spatial_shape: tuple[int, int]) -> exact.Plan:
        """How exact values on ``(H, W)`` images are computed; operations and memory, in advance.

        >>> layer = SelfNormConv2d(3, 3)
        >>> print(layer.exact_plan((64, 64)))
        blocks: 64 blocks of 192 rows; 3 Gflop and 40.1 MB (dense 1.2e+03 Gflop and 1.2 GB)
        """
        return self.shape.exact_plan(spatial_shape)

    def extra_repr(self) -> str:
        inverse = tuple(self.weight_inv.shape[2:])
        return f"{self.shape}, inverse_kernel_size={inverse}, bias={self.bias is not None}"
