"""From pixel values to unbounded real numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_zeros


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

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be at least 1; got {levels}")
        self.levels = levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return FlowStep(x + torch.rand_like(x), per_sample_zeros(x), per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return z.floor().clamp(0, self.levels - 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


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
