"""The learned inverse as a control variate: its bias turned into small noise of mean zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bijection import wide_dtype


class Debias(NamedTuple):
    """How a self-normalizing layer corrects the inverse term of its gradient.

    Attributes:
        terms: K, terms of the series after the learned inverse; 0 for none.
        probes: P, independent vectors of random signs.
        roulette: probability of one more term after the K-th, and after each further one, weighted
            by its inverse: exactly unbiased, however many terms it would take. 0 for none.

    After a training step the layer's ``growth`` is the factor by which ``I - W R`` lengthened the
    probes last, an estimate from below of its norm that costs nothing. From 1 on the series does
    not converge, and the layer's gradient was left as the learned inverse gives it.
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


def scales_of(how: Debias) -> list[float]:
    """A number for each term: 1 up to the K-th, and what makes up for those that roulette left out.

    How many terms roulette adds is drawn from torch's generator.
    """
    scales = [1.0] * how.terms
    weight = 1.0
    while how.roulette and float(torch.rand(())) < how.roulette:
        weight /= how.roulette
        scales.append(weight)
    return scales


def signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Independent random signs of the dtype and on the device of ``like``.

    Drawn in float32 at least: a half precision would often draw 0, which has only one sign.
    """
    drawn = 2 * torch.rand(shape, dtype=wide_dtype(like.dtype), device=like.device) - 1
    return torch.copysign(torch.ones_like(drawn), drawn).to(like.dtype)
