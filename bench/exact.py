"""Exact values of one convolution, each way of computing them; see ``bench.exact_cases.EXACT``.

- package: ``snf_ext.exact``, named after its plan: "package (blocks)" and "package (fourier)";
- dense: LU of the whole matrix, up to D = 3072, as the package did before;
- band: LAPACK's band with pivoting, through scipy, for zero padding without dilation.

All in float64, on the same weight; what they compute is compared before it is timed. Of the blocks
every size that the plan chooses from is timed too, to see what its model of the cost is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snf_ext import exact
from snf_ext.exact.band_lu import BandLUs
from snf_ext.exact.block_lu import BlockLU
from snf_ext.exact.plan import Layout, layout_of, layouts
from snf_ext.layers.initial import near_identity

from .exact_cases import ExactCase
from .exact_dense import dense_log_abs_det, dense_lu
from .timing import Variant, interleave

__all__ = ["check_values", "exact_variants", "layout_rows", "make_weight"]

DENSE_FEATURES = 3072
RIGHT_SIDES = 100
TOLERANCE = 1e-9
# Blocks that take more operations than a dense matrix of 3072 rows, twice, are not timed.
LAYOUT_OPERATIONS = 4e10
LAYOUT_ROUNDS = 5


def make_weight(case: ExactCase) -> Tensor:
    """The case's weight in float64."""
    torch.manual_seed(0)
    if not case.away:
        return near_identity(case.weight_shape, case.groups).double()
    weight = torch.zeros(case.weight_shape, dtype=torch.float64)
    torch.nn.init.dirac_(weight, case.groups)
    return weight + 0.3 * torch.randn_like(weight) / (9 * case.channels) ** 0.5


def exact_variants(
    case: ExactCase, *, compiled: bool = False, device: torch.device | str = "cpu"
) -> list[Variant]:
    """The ways that there are to do the operation; each step returns what it computes."""
    weight = make_weight(case)
    rhs = torch.randn(RIGHT_SIDES, case.features, dtype=torch.float64)
    ways: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
        f"package ({case.plan.method})": (
            lambda: exact.factorize_conv2d(weight, *case.geometry),
            lambda w: exact.conv2d_log_abs_det(w, *case.geometry),
        )
    }
    if case.features <= DENSE_FEATURES:
        ways["dense"] = (
            lambda: dense_lu(weight, *case.geometry),
            lambda w: dense_log_abs_det(w, *case.geometry),
        )
    variants = [
        _variant(name, case.operation, factorize, log_abs_det, weight, rhs)
        for name, (factorize, log_abs_det) in ways.items()
    ]
    if case.operation in ("log-det", "solve") and not case.circular and case.dilation == 1:
        band = _variant("band", case.operation, lambda: _Band(weight, case), None, weight, rhs)
        variants.append(band)
    return variants


def _variant(
    name: str,
    operation: str,
    factorize: Callable[[], Any],
    log_abs_det: Callable[[Tensor], Tensor] | None,
    weight: Tensor,
    rhs: Tensor,
) -> Variant:
    if operation == "log-det":
        return Variant(name, lambda: factorize().log_abs_det)
    if operation == "solve":
        factorization = factorize()
        return Variant(name, lambda: factorization.solve(rhs))
    if operation == "factorise + solve":
        return Variant(name, lambda: factorize().solve(rhs))
    assert operation == "log-det + gradient"
    assert log_abs_det is not None
    leaf = weight.clone().requires_grad_()

    def step() -> Tensor:
        leaf.grad = None
        value = log_abs_det(leaf)
        value.backward()
        return value.detach()

    return Variant(name, step, leaves=(leaf,))


class _Band:
    """The band's LU, with the rows of a solution in the order of ``x.flatten(1)``."""

    def __init__(self, weight: Tensor, case: ExactCase) -> None:
        self._split = (case.groups, case.channels // case.groups, case.height, case.width)
        kernels = weight.unflatten(0, (case.groups, -1))
        self._lus = BandLUs(kernels, (case.height, case.width))
        self.log_abs_det = self._lus.log_abs_det.sum()

    def solve(self, rhs: Tensor) -> Tensor:
        images = rhs.reshape(-1, *self._split).permute(1, 3, 4, 2, 0)
        solved = self._lus.solve(images.flatten(1, 3)).reshape(images.shape)
        return solved.permute(4, 0, 3, 1, 2).reshape(rhs.shape)


def check_values(variants: Sequence[Variant]) -> None:
    """Raises RuntimeError where two variants differ by more than 1e-9 of the largest element.

    Of a log-determinant, by more than 1e-9 of its value or of 1 nat.
    """
    first, expected = variants[0], _values(variants[0])
    for v in variants[1:]:
        for what, a, b in zip(("value", "gradient"), _values(v), expected, strict=False):
            error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
            if not error <= TOLERANCE:
                raise RuntimeError(f"{v.name} and {first.name} differ by {error:.1e} in the {what}")


def _values(variant: Variant) -> list[Tensor]:
    value = variant.step()
    assert isinstance(value, Tensor)
    return [value.clone(), *(gradient.clone() for gradient in variant.gradients())]


# ---- Sizes of blocks -----------------------------------------------------------------------------


def layout_rows(case: ExactCase, rounds: int, min_sample: float) -> list[dict[str, Any]]:
    """Times the elimination for every block the plan chooses from, and prints what it chose."""
    if case.operation not in ("log-det", "log-det + gradient"):
        return []
    if case.circular or case.dilation > 1:  # no blocks, or several pieces
        return []
    kernels = make_weight(case).unflatten(0, (case.groups, -1))
    size = (case.height, case.width)
    chosen = layout_of(tuple(kernels.shape), size)
    found = [
        layout
        for layout in layouts(tuple(kernels.shape), size)
        if layout.operations < LAYOUT_OPERATIONS
        # The kernel is as wide as tall, so that a square image's two directions are alike.
        and not (layout.transposed and case.height == case.width)
    ]
    if chosen not in found:
        raise RuntimeError(f"{case.name}: the plan's own blocks take too long: {chosen}")
    variants = [Variant(_words(layout), _elimination(kernels, layout, case)) for layout in found]
    timings = interleave(variants, rounds=min(rounds, LAYOUT_ROUNDS), min_sample=min_sample)
    medians = [timings[v.name].quartiles()[1] for v in variants]
    best = min(medians)
    rows = [
        {
            "case": case.name,
            "transposed": layout.transposed,
            "rows": layout.rows,
            "blocks": layout.blocks,
            "block_size": layout.rows * layout.size[1] * kernels.shape[1],
            "operations": layout.operations,
            "predicted_s": layout.seconds,  # of the log-determinant alone
            "median_s": median,
            "chosen": layout == chosen,
            "over_best": median / best,
        }
        for layout, median in zip(found, medians, strict=True)
    ]
    print(f"  plan: {case.plan}")
    for layout, row in zip(found, rows, strict=True):
        print(
            f"  {_words(layout):<22}{row['median_s'] * 1e3:>9.3f} ms"
            f"{row['over_best']:>8.2f} of the best" + "  <- chosen" * row["chosen"]
        )
    over = next(row["over_best"] for row in rows if row["chosen"])
    print(f"  choice within {over:.2f} x of the best\n", flush=True)
    return rows


def _words(layout: Layout) -> str:
    along = "columns" if layout.transposed else "rows"
    return f"blocks of {layout.rows} {along}"


def _elimination(kernels: Tensor, layout: Layout, case: ExactCase) -> Callable[[], Tensor]:
    turned = kernels.mT if layout.transposed else kernels
    if case.operation == "log-det":
        return lambda: BlockLU(turned, layout.size, layout.rows).log_abs_det
    return lambda: BlockLU(turned, layout.size, layout.rows).gradient()
