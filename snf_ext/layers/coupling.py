"""Couplings: one part of an event passes, and a network of it says how the other is changed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_zeros
from .conditioner import ImageNetwork, vector_network
from .event import check_context, checked_size

MASKS = ("channel", "checkerboard", "vector")


class _Coupling(Bijection):
    """What the couplings share: the split, the network and its context."""

    params_each: ClassVar[int]
    """Parameters that the network gives for each changed element."""

    def __init__(
        self,
        channels: int,
        width: int = 512,
        *,
        mask: str = "channel",
        flipped: bool = False,
        context_features: int = 0,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}; got {mask!r}")
        self.channels = checked_size("channels", channels, 1 if mask == "checkerboard" else 2)
        self.width = checked_size("width", width)
        self.context_features = checked_size("context_features", context_features, 0)
        self.mask, self.flipped = mask, flipped
        if mask == "checkerboard":
            self.passing = self.changed = channels
        else:
            first = channels // 2
            self.passing = channels - first if flipped else first
            self.changed = channels - self.passing
        if net is None:
            make = vector_network if mask == "vector" else ImageNetwork
            outputs = self.params_each * self.changed
            net = make(self.passing + context_features, outputs, width)
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        return FlowStep(*self._map(x, "x", context, inverse=False), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return self._map(z, "z", context, inverse=True)[0]

    def _map(
        self, x: Tensor, name: str, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        self._check(x, name)
        if self.mask == "checkerboard":
            passes = self._checkerboard(x)
            params = self._params(x * passes, context)
            return self._change(x, params * (1 - passes), inverse)
        if not self.flipped:
            return self._change(x, self._params(x[:, : self.passing], context), inverse)
        changed, passing = x.split((self.changed, self.passing), 1)
        y, log_det = self._change(changed, self._params(passing, context), inverse)
        return torch.cat((y, passing), 1), log_det

    def _params(self, passing: Tensor, context: Tensor | None) -> Tensor:
        inputs = self._with_context(passing, context)
        # Under autocast the network answers in a narrower precision.
        return self.net(inputs).to(passing.dtype)

    def _change(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """x with its last channels changed by ``params``; log_det ``(B,)``."""
        raise NotImplementedError

    def _checkerboard(self, x: Tensor) -> Tensor:
        """1 where a cell passes, ``(H, W)``."""
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
        odd = (rows[:, None] + columns) % 2
        return (odd if self.flipped else 1 - odd).to(x.dtype)

    def _with_context(self, passing: Tensor, context: Tensor | None) -> Tensor:
        features = self.context_features
        maps = (passing.shape[0], features, *passing.shape[2:])
        if context is None or context.dim() != 4 or self.mask == "vector" or not features:
            check_context(context, passing.shape[0], features)
            if context is None:
                return passing
            context = context.view(*context.shape, *(1,) * (passing.dim() - 2))
        elif tuple(context.shape) != maps:
            raise ValueError(
                f"context must have shape [B, K, H, W] = {list(maps)}; got {list(context.shape)}"
            )
        return torch.cat((passing, context.to(passing.dtype).expand(maps)), 1)

    def _check(self, x: Tensor, name: str) -> None:
        dims, shape = (2, "[B, D] with D") if self.mask == "vector" else (4, "[B, C, H, W] with C")
        if x.dim() != dims or x.shape[1] != self.channels:
            raise ValueError(
                f"{name} must have shape {shape} = {self.channels}; got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        text = f"{self.channels}, width={self.width}, mask={self.mask!r}, flipped={self.flipped}"
        return text + f", context_features={self.context_features}" * bool(self.context_features)


class AffineCoupling(_Coupling):
    """``z = x exp(l) + t`` for one part of an event; l and t from a network of the other part.

    ``l = 2 tanh(raw / 2)`` keeps the scale within ``e^-2 .. e^2``; the network gives raw, t, raw,
    t, ... A fresh layer is the identity.

    Shapes: x ``(B, C, H, W)``, or ``(B, D)`` for vectors; z the same; ``log_det`` ``(B,)``.

    Args:
        channels: C, or D.
        width: hidden channels or features of the network.
        mask: which part passes. ``"channel"``: the first ``C // 2`` channels. ``"checkerboard"``:
            the cells whose row + column is even; the network sees the image with zeros at the
            others. ``"vector"``: the first ``D // 2`` features of vectors.
        flipped: the other part passes.
        context_features: K; the network also sees a context ``(B, K)``, or for images
            ``(B, K, H, W)``.
        net: takes the passing part with the context appended along dimension 1, and gives the
            parameters ``(B, 2T, ...)`` of T changed channels (all C under a checkerboard). Default:
            3x3, 1x1 and 3x3 convolutions with ReLU between and Glow's scaled zero start, or three
            linear maps for vectors.

    Raises:
        ValueError: a setting is out of range; x has the wrong shape; the context is missing, not
            expected, or of the wrong shape.

    Cost: that of the network, in both directions.
    Source: Dinh et al. 2016, "Real NVP"; Kingma and Dhariwal 2018, "Glow"; NNN 81-83.

    >>> f = AffineCoupling(4, width=8)
    >>> x = torch.randn(2, 4, 6, 6)
    >>> torch.equal(f(x).z, x)
    True
    >>> g = AffineCoupling(5, width=8, mask="vector", context_features=3)
    >>> g(torch.randn(2, 5), context=torch.randn(2, 3)).z.shape
    torch.Size([2, 5])
    """

    params_each = 2

    def _change(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(x, params, inverse)


class AdditiveCoupling(_Coupling):
    """``z = x + t`` for one part of an event; t from a network of the other part. log_det is 0.

    Arguments, shapes and errors are those of :class:`AffineCoupling`; the network gives one
    parameter for each changed element.

    Source: Dinh et al. 2014, "NICE"; SFM 3.4.

    >>> f = AdditiveCoupling(1, width=8, mask="checkerboard")
    >>> f(torch.randn(2, 1, 6, 6)).log_det.tolist()
    [0.0, 0.0]
    """

    params_each = 1

    def _change(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, changed = x.split((x.shape[1] - params.shape[1], params.shape[1]), 1)
        y = changed - params if inverse else changed + params
        return torch.cat((kept, y), 1), per_sample_zeros(x)
