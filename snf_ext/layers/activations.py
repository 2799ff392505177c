"""Element-wise activations with an inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bijection import Bijection, FlowStep, per_sample_sum, per_sample_zeros, wide_dtype

_NEWTON_LIMIT = 100


class SmoothLeakyReLU(Bijection):
    """``z = a x + (1 - a) log(1 + e^x)``, element by element: slope a on the left, 1 on the right.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, in (0, 1].

    Raises:
        ValueError: ``alpha`` is outside (0, 1].

    Source: Gresele et al. 2020, used by SNF A.3 with a = 0.3. The inverse is Newton's method,
    which on this convex function converges from the right without overshooting.

    >>> f = SmoothLeakyReLU(0.3)
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(f.inverse(f(x).z), x, atol=1e-5)
    True
    """

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1]; got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> FlowStep:
        log_det = per_sample_sum(self._slope(x.to(wide_dtype(x.dtype))).log())
        return FlowStep(self._value(x), log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        with torch.no_grad():
            # f(x) >= x and f(x) >= a x, so this start lies on the right of the root.
            x = torch.where(z > 0, z, z / self.alpha)
            tolerance = 4 * torch.finfo(z.dtype).eps
            for _ in range(_NEWTON_LIMIT):
                step = (self._value(x) - z) / self._slope(x)
                x = x - step
                if not (step.abs() > tolerance * (1 + x.abs())).any():
                    break
        if not z.requires_grad:
            return x
        # One more step carries the gradient dx/dz = 1 / f'(x).
        return x - (self._value(x) - z) / self._slope(x)

    def _value(self, x: Tensor) -> Tensor:
        # The threshold at which torch takes softplus for the identity, past float64's precision.
        return self.alpha * x + (1 - self.alpha) * F.softplus(x, threshold=40)

    def _slope(self, x: Tensor) -> Tensor:
        return self.alpha + (1 - self.alpha) * torch.sigmoid(x)

    def extra_repr(self) -> str:
        return f"{self.alpha}"
