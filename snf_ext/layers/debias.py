"""The learned inverse as a control variate: its bias turned into small noise of mean zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Debias(NamedTuple):
    """How a self-normalizing layer corrects the inverse term of its gradient.

    Attributes:
        terms: K, terms of the series after the learned inverse; 0 for none.
        probes: P, independent vectors of random signs.
        roulette: probability of one more term after the K-th, and after each further one, weighted
            by its inverse: exactly unbiased, however many terms it would take. 0 for none.
    """

    terms: int = 0
    probes: int = 1
    roulette: float = 0.0

    def checked(self) -> Debias:
        """Itself, or ValueError."""
        for name, value, least in (("terms", self.terms, 0), ("probes", self.probes, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"debias.{name} must be an int of at least {least}; got {value!r}")
        if not 0 <= self.roulette < 1:
            raise ValueError(f"debias.roulette must be in [0, 1); got {self.roulette!r}")
        if self.roulette and not self.terms:
            raise ValueError("debias.roulette must be 0 without terms, after which it is drawn")
        return self


class Correction(NamedTuple):
    """``W^-1 - R`` applied to probes.

    Attributes:
        v: the probes, random signs.
        u: ``R sum_k E^k v``; zeros where the guard found the series growing.
        growth: ``||E^K v|| / ||E^(K-1) v||`` over all probes, an estimate of ``||E||``, a scalar.
    """

    v: Tensor
    u: Tensor
    growth: Tensor


@torch.no_grad()
def correction(
    v: Tensor,
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    how: Debias,
) -> Correction:
    """The series that the learned inverse is the first term of, on probes ``v``.

    With ``E = I - W R`` of spectral radius under 1,

        W^-1 = R (I + E + E^2 + ...)        u = R (E + ... + E^K) v

    so that the mean of ``v u'`` over random signs v is the transpose of what R lacks. Where E does
    not shrink the probes the series diverges and u is zeros.

    Args:
        v: random signs, ``(P, ...)``.
        forward, backward: ``x -> W x`` and ``y -> R y``.
        how: number of terms, and what follows.

    Cost: K products with W and K + 1 with R, of P samples.
    """
    power = before = v
    image, total, weight = backward(power), None, 1.0
    taken = 0
    while taken < how.terms or (how.roulette and float(torch.rand(())) < how.roulette):
        if taken >= how.terms:
            weight /= how.roulette
        before, power = power, power - forward(image)
        image = backward(power)
        term = image if weight == 1 else weight * image
        total = term if total is None else total + term
        taken += 1
    assert total is not None
    smallest = torch.finfo(v.dtype).tiny
    growth = _norm(power) / _norm(before).clamp(min=smallest)
    return Correction(v, torch.where(growth < 1, total, 0), growth)


def signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Independent random signs of the dtype and on the device of ``like``."""
    drawn = torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(-1, 1)
    return torch.copysign(torch.ones_like(drawn), drawn)


def with_gradient(log_det: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """``log_det``, which also gives ``weight`` ``gradient`` for each of its elements."""
    linear = torch.dot(weight.to(gradient).flatten(), gradient.flatten())
    return log_det + (linear - linear.detach())


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach())
