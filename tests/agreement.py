"""When an operator's result counts as the reference's, whatever the numbers: the rule of
docs/robustness.md.

- Where nothing that is not finite is reached and nothing overflows on the way, the result is finite
  and differs by rounding only.
- A finite result is right: never is a number given in the place of another, of inf or of NaN.
- Outputs are NaN where the reference is, and the same infinity. Gradients are not finite where the
  reference's are not; which of the two they are depends on the order of sums, and within one
  (output, input) pair of a kernel's taps they may spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 64  # of the precision, for errors of sums of some hundred terms


def precision(dtype: torch.dtype) -> float:
    """Of the arithmetic, where tensors are of ``dtype``."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def tolerance(size: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """By the sizes of the terms; ``stored``: what results are rounded to."""
    eps = FACTOR * precision(dtype) + (2 * torch.finfo(dtype).eps if stored == dtype else 0)
    return eps * size + 2 * torch.finfo(stored).tiny


@dataclass
class Rule:
    """How one result is to be judged."""

    units: tuple[int, ...] = ()  # dimensions in which what is not finite may spread
    output: bool = False  # NaN and infinities as the reference has them
    overflows: bool = False  # there are numbers so large that an infinity may become NaN


def agree(name: str, got: Tensor, exact: Tensor, allowed: Tensor, sure: Tensor, rule: Rule):
    """``allowed``: of the difference. ``sure``: where the result must be finite."""
    assert got.shape == exact.shape, name
    got = got.detach().double()
    finite, wanted = got.isfinite(), exact.isfinite()

    def anywhere(t):
        return t.any(rule.units, keepdim=True).expand_as(t) if rule.units and t.numel() else t

    lost = ~anywhere(~sure) & ~finite
    assert not lost.any(), f"{name} is not finite at {lost.nonzero()[:3].tolist()}: {got[lost][:3]}"
    wrong = finite & wanted & ((got - exact).abs() > allowed)
    assert not wrong.any(), (
        f"{name} at {wrong.nonzero()[:3].tolist()}: {got[wrong][:3].tolist()} instead of "
        f"{exact[wrong][:3].tolist()}, allowed {allowed.expand_as(got)[wrong][:3].tolist()}"
    )
    silent = ~wanted & ~anywhere(~finite)
    assert not silent.any(), (
        f"{name} is {got[silent][:3].tolist()} where it is {exact[silent][:3].tolist()}"
    )
    if rule.output:
        assert got[exact.isnan()].isnan().all(), f"{name} is a number where it is none"
        if not rule.overflows:
            infinite = exact.isinf()
            assert torch.equal(got[infinite], exact[infinite]), f"{name}: infinities differ"
