"""What layers share whose learned inverse can be refined."""

from __future__ import annotations

from torch import Tensor

from ..bijection import Bijection
from ..refine import Refined


class Refining(Bijection):
    """A bijection that says how its learned inverse is refined."""

    refines = True

    def undo(
        self, z: Tensor, context: Tensor | None = None, exact: bool = False, refine: int = 0
    ) -> Tensor:
        if exact:
            return self.inverse(z, exact=True)
        return self._refined(z, refine, wait=z.device.type == "cpu").x.to(z.dtype)

    def _refined(
        self, z: Tensor, steps: int, layer: str | None = None, wait: bool = True
    ) -> Refined:
        """The learned inverse, refined; see :func:`snf_ext.refine.refined`."""
        raise NotImplementedError
