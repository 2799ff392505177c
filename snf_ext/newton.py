"""The true inverse of a map that is given as a function, by Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor

from . import func_transforms
from .jacobian import EventMap, jacobian

HALVINGS = 12


def newton_inverse(
    function: EventMap, z: Tensor, start: Tensor, name: str = "f", steps: int = 50
) -> Tensor:
    """Solve ``f(x) = z`` for each event: ``x <- x + t J(x)^-1 (z - f(x))``.

    t is the first of 1, 1/2, 1/4, ... that makes the residual smaller. An event is done when its
    residual is down to the precision or no step makes it smaller; what others in its batch do
    does not matter. The result has the first derivative of the true inverse with respect to z and
    to whatever f depends on (one last step at the solution, J held fixed).

    Args:
        function: f, differentiable in forward mode.
        z: ``(B, ...)`` float32 or float64.
        start: where to start, as z; where it is not finite, z itself.
        name: what to call f in the error.
        steps: the most that are taken.

    Raises:
        NotImplementedError: inside a transform of ``torch.func``.
        ValueError: a residual ``||z - f(x)||`` does not come under the root of the precision times
            ``max(1, ||z||)``: z is not in the range of f, or f is singular on the way.

    Cost: each step O(D) forward passes and O(D^3) an event, and waits for the device.
    Source: Newton's method with step halving; Nocedal and Wright, "Numerical Optimization", 11.

    >>> x = newton_inverse(lambda x: x + x**3, torch.tensor([[10.0]]), torch.tensor([[0.0]]))
    >>> round(x.item(), 4)
    2.0
    """
    if func_transforms.active():
        raise NotImplementedError(
            f"the exact inverse of {name} is found by Newton's method, which looks at values that "
            "the transforms of torch.func hide; take the learned inverse, or call it outside"
        )
    with torch.no_grad():
        x = _solve(function, z, start, name, steps)
    rest = z - function(x)
    if not rest.requires_grad:
        return x
    with torch.no_grad():
        slope = jacobian(function, x)
    return x + _solved(slope, rest)


def _solve(function: EventMap, z: Tensor, start: Tensor, name: str, steps: int) -> Tensor:
    precision = torch.finfo(z.dtype).eps
    x = torch.where(start.isfinite(), start, z)
    rest = z - function(x)
    scale = _norm(z).clamp(min=1)
    going = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(steps):
        going &= ~(_norm(rest) <= precision * scale)
        chosen = going.nonzero().squeeze(1)
        if not len(chosen):
            break
        near, aim, left = x[chosen], z[chosen], rest[chosen]
        step = _solved(jacobian(function, near), left)
        moved = torch.zeros_like(chosen, dtype=torch.bool)
        for halving in range(HALVINGS):
            trial = near + step * 0.5**halving
            trial_rest = aim - function(trial)
            better = ~moved & (_norm(trial_rest) < _norm(left))
            x[chosen[better]], rest[chosen[better]] = trial[better], trial_rest[better]
            moved |= better
            if moved.all():
                break
        going[chosen] = moved
    residual = _norm(rest) / scale
    failed = ~(residual <= precision**0.5)
    if failed.any():
        raise ValueError(
            f"z must be in the range of {name}: Newton's method did not converge for "
            f"{int(failed.sum())} of {len(z)} events; got residuals ||z - f(x)|| / max(1, ||z||) "
            f"of up to {residual[failed].max():.3g}"
        )
    return x


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _solved(slope: Tensor, rest: Tensor) -> Tensor:
    """``J^-1 r``; not finite, rather than an error, where J is singular."""
    return torch.linalg.solve_ex(slope, rest.flatten(1))[0].reshape(rest.shape)
