"""Class labels as the context of a conditional flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import Flow
from .errors import UserError


def context_of(flow: Flow, labels: Tensor | None) -> Tensor | None:
    """Labels ``(N,)`` one-hot as ``(N, flow.context_features)``; None if the flow takes no context.

    On the flow's device and in its precision.

    Raises:
        UserError: the flow takes a context and there are no labels, or one has no place in it.

    >>> import snf_ext
    >>> context_of(snf_ext.models.fc((1, 2, 2)), torch.tensor([1, 0])) is None
    True
    """
    if not flow.context_features:
        return None
    if labels is None:
        raise UserError(f"labels must be given: the flow takes {flow.context_features} classes")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < flow.context_features:
        raise UserError(
            f"labels must lie in 0..{flow.context_features - 1}; "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
    like = next(flow.parameters(), torch.empty(0))
    return F.one_hot(labels.to(like.device), flow.context_features).to(like.dtype)


def rows_of_classes(count: int, classes: int) -> tuple[Tensor, int]:
    """Labels of ``count`` samples that fill a grid row by row, one row a class; its columns.

    >>> rows_of_classes(7, 3)
    (tensor([0, 0, 0, 1, 1, 1, 2]), 3)
    """
    columns = -(-count // classes)
    return torch.arange(classes).repeat_interleave(columns)[:count], columns
