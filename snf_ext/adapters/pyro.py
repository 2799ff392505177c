"""Flows as distributions of Pyro, for its models and guides."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..distributions import FlowDistribution
from ..flow import Flow
from ..training.errors import require


def pyro_distribution(flow: Flow, context: Tensor | None = None, exact: bool = True) -> Any:
    """``flow.as_distribution(context, exact)`` with what Pyro's ``sample`` asks of a distribution.

    ``pyro.module("flow", flow)`` in the same model or guide gives Pyro the parameters. A context
    ``(B, K)`` gives the ``batch_shape`` ``(B,)``, for a plate of that size.

    A guide may as well push noise forward, by ``pyro.distributions.TransformedDistribution`` and
    :class:`snf_ext.BijectionTransform` with ``cache_size=1``: a sample and its density are then
    one pass each way less. That needs no adapter.

    Raises:
        UserError: Pyro is not installed.
        TypeError, ValueError: as :class:`snf_ext.FlowDistribution`.

    Source: Bingham et al. 2019, "Pyro: deep universal probabilistic programming".

    >>> import pyro  # doctest: +SKIP
    >>> def guide():  # doctest: +SKIP
    ...     pyro.module("flow", flow)
    ...     return pyro.sample("z", pyro_distribution(flow))
    """
    return _pyro_flow()(flow, context, exact)


@cache
def _pyro_flow() -> type[FlowDistribution]:
    """Made on demand, so that this module can be imported without Pyro."""
    mixin = require("pyro", "pyro").distributions.torch_distribution.TorchDistributionMixin
    return type("PyroFlow", (FlowDistribution, mixin), {})
