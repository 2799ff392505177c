"""From pixel values to unbounded real numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_zeros, push
from ..shard import drawn_for
from .coupling import AffineCoupling
from .event import check_events, checked_event_shape, checked_size


class Dequantize(Bijection):
    """``z = x + u`` with u uniform on [0, 1): turns integers 0..levels-1 into real numbers.

    Shapes: x ``(B, ...)`` of any dtype (integers become the default dtype), z the same,
    ``log_det`` zeros: the density of z averages to the probability of x, so its logarithm is a
    lower bound in expectation. The inverse rounds down and clamps to the levels.

    Args:
        levels: number of values a pixel can take.

    >>> images = torch.tensor([[0, 255]], dtype=torch.uint8)
    >>> f = Dequantize()
    >>> f.inverse(f(images).z).tolist()
    [[0.0, 255.0]]
    """

    undoes = False

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be at least 1; got {levels}")
        self.levels = levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return FlowStep(x + drawn_for(x, torch.rand_like), per_sample_zeros(x), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return z.floor().clamp(0, self.levels - 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class VariationalDequantize(Bijection):
    """``z = x + u`` with u in (0, 1) drawn from a learned density q(u | x).

    ``u = sigmoid(g(e; x))``, e standard normal and g a flow of couplings that see the image,
    scaled to [-1, 1], as their context. ``log_det = -log q(u | x)``, so that the mean of the
    flow's log-density is a lower bound on log P(x), tighter than that of :class:`Dequantize`. The
    couplings start as the identity. The inverse rounds down and clamps to the levels.

    Shapes: x ``(B, *event_shape)`` of any dtype (integers become that of the parameters), z the
    same, ``log_det`` ``(B,)`` in nats.

    Args:
        event_shape: ``(C, H, W)``, or ``(D,)`` with D at least 2.
        levels: number of values a pixel can take.
        width: hidden channels of the couplings' networks.
        steps: number of couplings; those of images take the two colours of a checkerboard in
            turn, those of vectors the two halves.

    Raises:
        ValueError: a setting is out of range, or x has the wrong shape.

    Cost: that of the networks. Source: Ho et al. 2019, "Flow++", section 3.1.

    >>> images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    >>> f = VariationalDequantize((1, 4, 4))
    >>> torch.equal(f.inverse(f(images).z), images.float())
    True
    """

    undoes = False

    def __init__(
        self, event_shape: tuple[int, ...], levels: int = 256, width: int = 32, steps: int = 4
    ) -> None:
        super().__init__()
        self.event_shape = checked_event_shape(event_shape)
        if len(self.event_shape) not in (1, 3):
            raise ValueError(f"event_shape must be (C, H, W) or (D,); got {list(event_shape)}")
        self.levels = checked_size("levels", levels)
        channels = self.event_shape[0]
        self.couplings = nn.ModuleList(
            AffineCoupling(
                channels,
                width,
                mask="checkerboard" if len(self.event_shape) == 3 else "vector",
                flipped=step % 2 == 1,
                context_features=channels,
            )
            for step in range(checked_size("steps", steps))
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        check_events(x, "x", self.event_shape)
        if not x.is_floating_point():
            x = x.to(next(self.parameters()).dtype)
        e = drawn_for(x, torch.randn_like)
        image = x / max(1, self.levels - 1) * 2 - 1
        v, log_det, recon = push(list(self.couplings), e, image, exact=False)  # type: ignore[arg-type]
        u, log_slope = ops.logit(v, 0.0, inverse=True)
        # x + u may round to x + 1, which is another level.
        below = torch.nextafter(x.detach() + 1, x.detach())
        log_q = ops.normal_log_prob(e) - log_det - log_slope
        return FlowStep(torch.minimum(x + u, below), -log_q, recon)

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        check_events(z, "z", self.event_shape)
        return z.floor().clamp(0, self.levels - 1)

    def extra_repr(self) -> str:
        return f"{self.event_shape}, levels={self.levels}"


class Normalize(Bijection):
    """``z = (x - shift) / scale``, element by element, with fixed numbers.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``: ``-D log |scale|``.

    Args:
        shift, scale: floats; ``scale`` is not 0.

    >>> Normalize(0.0, 2.0)(torch.ones(1, 3)).z.tolist()
    [[0.5, 0.5, 0.5]]
    """

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        if scale == 0:
            raise ValueError("scale must not be 0; got 0")
        self.shift, self.scale = float(shift), float(scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        elements = math.prod(x.shape[1:])
        zeros = per_sample_zeros(x)
        return FlowStep(
            (x - self.shift) / self.scale, zeros - elements * math.log(abs(self.scale)), zeros
        )

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return z * self.scale + self.shift

    def extra_repr(self) -> str:
        return f"shift={self.shift}, scale={self.scale}"


class Logit(Bijection):
    """``z = log s - log(1 - s)`` with ``s = a + (1 - 2a) x``, element by element, x in [0, 1].

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, in [0, 0.5): keeps s away from 0 and 1.

    Source: Papamakarios et al. 2017; SNF A.3 with a = 1e-6.

    >>> f = Logit(0.05)
    >>> x = torch.rand(2, 3)
    >>> torch.allclose(f.inverse(f(x).z), x, atol=1e-5)
    True
    """

    def __init__(self, alpha: float = 1e-6) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must be in [0, 0.5); got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        z, log_det = ops.logit(x, self.alpha)
        return FlowStep(z, log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return ops.logit(z, self.alpha, inverse=True)[0]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def preprocessing(pixel_levels: int = 256) -> list[Bijection]:
    """Uniform dequantization, scaling to [0, 1], logit with a = 1e-6 (SNF A.3)."""
    return [Dequantize(pixel_levels), Normalize(0.0, pixel_levels), Logit(1e-6)]
