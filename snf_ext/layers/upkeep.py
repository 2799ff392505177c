"""How a learned inverse is kept: trained by the reconstruction penalty, or fitted to the weight."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Penalty(NamedTuple):
    """The inverse R is a parameter, trained by its density and by the reconstruction penalty.

    Attributes:
        share: of the penalty's gradient that the weight W gets, in [0, 1]. 1 is the paper's way,
            which holds W to maps that R can undo; with 0 the penalty trains R alone, and its
            product with R' is left out.
        symmetric: the penalty is the mean of ``||R W x - x||^2`` and ``||W R y - y||^2`` with
            y = W x, where the y that is subtracted is held fixed. Three more products forward and
            five backward.

    Source: SNF equation 3; the other two are options of the paper's public code.
    """

    share: float = 1.0
    symmetric: bool = False


class Tracked(NamedTuple):
    """R is no parameter: training fits it to W.

    Every so many steps a linear layer sets it to the inverse, and in each step makes it right on
    some samples of the batch (:func:`snf_ext.tracking.project_inverse_`): a singular value of W
    that comes close to 0 pushes back by its inverse, and would be past 0 before the next fit. A
    convolution has the least-squares kernel (:func:`snf_ext.tracking.least_squares_kernel`).
    There is no penalty, ``recon`` is 0 in training, and W gets its whole gradient ``dz x' + S R'``
    instead of half of two densities'.

    Attributes:
        every: steps between fits. If None, D / 8 for a linear layer and n / 128 for a convolution
            whose fit is by matrices of order n, C/groups times the taps of r; at least 1. A fit of
            a linear layer is O(D^3), and costs a step as much as a few more rows in the batch.
        samples: of the batch, that a linear layer's R is made right on in each step.
    """

    every: int | None = None
    samples: int = 32


Upkeep: TypeAlias = Penalty | Tracked

UPKEEP: dict[str, Upkeep] = {
    "penalty": Penalty(),
    "inverse-only": Penalty(share=0.0),
    "symmetric": Penalty(symmetric=True),
    "tracked": Tracked(),
}


def checked_upkeep(inverse: str | Upkeep) -> Upkeep:
    """What ``inverse`` stands for, or ValueError.

    >>> checked_upkeep("inverse-only")
    Penalty(share=0.0, symmetric=False)
    """
    keep = UPKEEP.get(inverse) if isinstance(inverse, str) else inverse
    if not isinstance(keep, Penalty | Tracked):
        raise ValueError(f"inverse must be one of {', '.join(UPKEEP)}; got {inverse!r}")
    if isinstance(keep, Tracked):
        if keep.every is not None and (type(keep.every) is not int or keep.every < 1):
            raise ValueError(f"inverse.every must be a positive int or None; got {keep.every!r}")
        if type(keep.samples) is not int or keep.samples < 0:
            raise ValueError(f"inverse.samples must be an int of at least 0; got {keep.samples!r}")
    elif not 0 <= keep.share <= 1:
        raise ValueError(f"inverse.share must be in [0, 1]; got {keep.share!r}")
    elif keep.symmetric and keep.share != 1:
        raise ValueError(f"inverse.share must be 1 where it is symmetric; got {keep.share!r}")
    return keep
