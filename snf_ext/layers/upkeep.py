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
    """R is no parameter: in training it is fitted to W anew every few steps.

    A linear layer has the inverse, a convolution the least-squares kernel
    (:func:`snf_ext.tracking.least_squares_kernel`). There is no penalty, ``recon`` is 0 in
    training, and W gets its whole gradient ``dz x' + S R'`` instead of half of two densities'.

    Attributes:
        every: steps between fits. If None n / 32, at least 1, for a fit by a matrix of order n: D,
            or C/groups times the taps of r. A fit of a linear layer is O(n^3), so that it costs a
            step about as much as 32 more rows in the batch.
        probes: P; a linear layer also projects R, in the steps without a fit, onto those matrices
            that undo W on P random directions (:func:`snf_ext.tracking.project_inverse_`), which
            costs three products of P D^2. 0 for not.
    """

    every: int | None = None
    probes: int = 0

    def interval(self, order: int) -> int:
        """Steps between fits by a matrix of ``order``.

        >>> Tracked().interval(784), Tracked().interval(9), Tracked(every=5).interval(784)
        (24, 1, 5)
        """
        return max(1, order // 32) if self.every is None else self.every


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
        if type(keep.probes) is not int or keep.probes < 0:
            raise ValueError(f"inverse.probes must be an int of at least 0; got {keep.probes!r}")
    elif not 0 <= keep.share <= 1:
        raise ValueError(f"inverse.share must be in [0, 1]; got {keep.share!r}")
    elif keep.symmetric and keep.share != 1:
        raise ValueError(f"inverse.share must be 1 where it is symmetric; got {keep.share!r}")
    return keep
