"""Element-wise activations with an inverse."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..bijection import Bijection, FlowStep, per_sample_zeros


class SmoothLeakyReLU(Bijection):
    """``z = a x + (1 - a) log(1 + e^x)``, element by element: slope a on the left, 1 on the right.

    Shapes: x ``(B, ...)``, z the same, ``log_det`` ``(B,)``.

    Args:
        alpha: a, in (0, 1].

    Raises:
        ValueError: ``alpha`` is outside (0, 1].

    Source: Gresele et al. 2020, used by SNF A.3 with a = 0.3. The inverse is Newton's method,
    which on this convex function converges from the right without overshooting.

    >>> import torch
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
        z, log_det = ops.smooth_leaky_relu(x, self.alpha)
        return FlowStep(z, log_det, per_sample_zeros(x))

    def inverse(self, z: Tensor, context: Tensor | None = None, exact: bool = False) -> Tensor:
        return self.inverse_with_iterations(z)[0]

    def inverse_with_iterations(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the most Newton iterations that an element took, an int64 scalar.

        >>> import torch
        >>> x, iterations = SmoothLeakyReLU(0.3).inverse_with_iterations(torch.zeros(1, 1))
        >>> round(x.item(), 3), iterations.item() < 10
        (-0.838, True)
        """
        x, _, iterations = ops.smooth_leaky_relu_inverse(z, self.alpha)
        return x, iterations

    def extra_repr(self) -> str:
        return f"{self.alpha}"
