"""A learned inverse, improved step by step until it is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .reference.autocast import without_autocast


class Refined(NamedTuple):
    """What a refined inverse gives.

    Attributes:
        x: the best iterate of each sample, in the precision computed in: float32 for half input.
        residual: its relative residual ``||y - W x|| / ||y||``, one number a sample; 0 for y = 0,
            NaN where y is not finite.
        steps: how many steps were taken.
    """

    x: Tensor
    residual: Tensor
    steps: int


class InverseNotConverged(UserWarning):
    """A refined inverse moves away from the solution; what came nearest to it is given."""


def refined(
    y: Tensor,
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    steps: int,
    event_dims: int = 1,
    layer: str | None = None,
    wait: bool = True,
) -> Refined:
    """Solve ``W x = y``, given an approximate inverse R of W.

        x <- R y,  then at most ``steps`` times  x <- x + R (y - W x)

    Each step multiplies the residual by ``I - W R``. It vanishes where the spectral radius of
    that is under 1, though it may grow at first; otherwise it grows without end. A sample is done
    when its residual is down to the precision, no longer shrinks though it is below the root of
    that (what is left is rounding), or has grown by its inverse. Each keeps its best iterate,
    whatever the others in its batch do.

    Args:
        y: float32 or float64, the last ``event_dims`` dimensions those of one sample.
        forward: ``x -> W x``, linear.
        backward: ``y -> R y``, linear.
        steps: the most that are taken.
        event_dims: number of dimensions of a sample.
        layer: what to call W in a warning; None for none.
        wait: look after each step whether all samples are done. If False, all steps are taken, and
            the host does not wait for a GPU.

    Warns:
        InverseNotConverged: ``layer`` is given, and a sample's last residual is above its first.

    Cost: ``steps + 1`` products with W and with R, and with ``wait`` one number read by the host a
    step, for which a GPU waits. Products with W are full float32 whatever torch's settings (TF32,
    autocast): rounding there would end up in x. The result is differentiable through the steps.
    Source: iterative refinement; Golub and Van Loan, "Matrix Computations", 4th edition, 11.2.

    >>> W, R = torch.tensor([[2.0]]), torch.tensor([[0.4]])  # I - W R = 0.2
    >>> x, residual, steps = refined(torch.tensor([[4.0]]), lambda x: x @ W, lambda y: y @ R, 3)
    >>> round(x.item(), 4), round(residual.item(), 4), steps  # 2 (1 - 0.2^4), 0.2^4
    (1.9968, 0.0016, 3)
    """
    event = tuple(range(-event_dims, 0))
    # Divided by the largest element, squares neither overflow nor underflow.
    scale = y.detach().abs().amax(event, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    norm = torch.linalg.vector_norm(y.detach() / scale, dim=event).clamp(min=1)

    def relative(r: Tensor) -> Tensor:
        return torch.linalg.vector_norm(r.detach() / scale, dim=event) / norm

    def choose(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.reshape(mask.shape + (1,) * event_dims), a, b)

    def rest(x: Tensor) -> Tensor:
        with _full_products():
            return y - forward(x)

    precision = torch.finfo(y.dtype).eps
    rounding = precision**0.5
    with without_autocast(y.device):
        best = x = backward(y)
        r = rest(x)
        residual = first = last = relative(r)
        active = (first > precision) & first.isfinite()
        taken = 0
        while taken < steps and (not wait or bool(active.any())):
            x = choose(active, x + backward(r), x)
            r = rest(x)
            last = relative(r)
            better = last < residual
            best, residual = choose(better, x, best), torch.where(better, last, residual)
            going_on = better | (residual > rounding)
            active = active & going_on & (residual > precision) & (last < first / precision)
            taken += 1
    if layer is not None and taken:
        _warn_of_growth(layer, first, last, residual, rounding, taken)
    return Refined(best, residual, taken)


def checked_steps(steps: object, name: str) -> int:
    """``steps``, or ValueError unless it is an int of at least 0."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name} must be an int of at least 0; got {steps!r}")
    return steps


def checked_refine(refine: int, exact: bool) -> int:
    """The argument ``refine`` of an inverse, or ValueError; an exact one must not have it."""
    if checked_steps(refine, "refine") and exact:
        raise ValueError(f"refine must be 0 with exact=True, which needs none; got {refine}")
    return refine


def _warn_of_growth(
    layer: str, first: Tensor, last: Tensor, best: Tensor, rounding: float, taken: int
) -> None:
    # Not what was NaN or inf before the first step, nor what moves within rounding.
    grew = first.isfinite() & ~(last <= first.clamp(min=rounding))
    count = int(grew.sum())
    if count:
        warnings.warn(
            f"the refined inverse of {layer} does not converge for {count} of {grew.numel()} "
            f"samples: their relative residual grew in the {taken} step(s) taken, from at most "
            f"{first[grew].max():.3g} at the start; the best iterate of each is given, at most "
            f"{best[grew].max():.3g}. Use exact=True",
            InverseNotConverged,
            stacklevel=5,
        )


@contextmanager
def _full_products() -> Iterator[None]:
    """A block in which products of float32 are not rounded to TF32 or bfloat16."""
    backends = torch.backends
    rounded = [
        (kind, kind.fp32_precision)
        for kind in (
            backends.cuda.matmul,
            backends.cudnn.conv,  # type: ignore[attr-defined]
            backends.mkldnn.matmul,  # type: ignore[attr-defined]
            backends.mkldnn.conv,  # type: ignore[attr-defined]
        )
        if kind.fp32_precision not in ("none", "ieee")
    ]
    try:
        for kind, _ in rounded:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, before in rounded:
            kind.fp32_precision = before
