"""What couplings put out, to see where training goes astray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..bijection import FlowStep
from .coupling import AdditiveCoupling, AffineCoupling


@contextmanager
def coupling_outputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Records the largest ``|z|`` of every coupling in ``module``, by its name, over all calls.

    The couplings are found at any depth. What is recorded are scalars on the device of z, so that
    nothing waits for a GPU. Only ``forward`` counts: neither inverses nor ``Flow.log_prob``.

    Source: SFM Figure 5.

    >>> import snf_ext
    >>> flow = snf_ext.Flow([snf_ext.AffineCoupling(4, width=8)], event_shape=(4, 2, 2))
    >>> with coupling_outputs(flow) as largest:
    ...     step = flow(torch.full((1, 4, 2, 2), -3.0))
    >>> {name: value.item() for name, value in largest.items()}
    {'bijections.0': 3.0}
    """
    largest: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, _args: object, step: FlowStep) -> None:
        if not step.z.numel():
            return
        value = step.z.detach().abs().amax()
        largest[name] = torch.maximum(largest[name], value) if name in largest else value

    hooks = [
        part.register_forward_hook(partial(record, name))
        for name, part in module.named_modules()
        if isinstance(part, (AffineCoupling, AdditiveCoupling))
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
