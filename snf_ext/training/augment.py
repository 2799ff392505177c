"""Random changes of training images that leave them as likely as they were.

Each works on a batch where that is, without a look at the numbers drawn, so that a CUDA graph can
hold it; and draws for a shard of a batch what the whole batch would (:mod:`snf_ext.shard`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..shard import drawn_for
from .errors import UserError


def flip(images: Tensor) -> Tensor:
    """Each image mirrored left to right with probability 1/2.

    Shapes: images ``(B, C, H, W)``, and so what comes back. Source: SNF A.3.

    >>> flip(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """
    (turned,) = _uniform(images, 1)
    return _moved(images, turned < 0.5)


def flip_jitter(images: Tensor) -> Tensor:
    """:func:`flip`, then a shift by -1, 0 or 1 pixels, independently along each axis.

    What moves in at an edge repeats the edge's pixels: black borders would be learned as part of
    the data.

    Shapes: images ``(B, C, H, W)``, and so what comes back. Source: SNF A.3, "random jitter by
    1 pixel".

    >>> _ = torch.manual_seed(0)
    >>> flip_jitter(torch.arange(4.0).view(1, 1, 1, 4)).tolist()
    [[[[2.0, 1.0, 0.0, 0.0]]]]
    """
    turned, down, right = _uniform(images, 3)
    return _moved(images, turned < 0.5, _step(down), _step(right))


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"flip": flip, "flip-jitter": flip_jitter}


def require_images(augment: str | None, event_shape: tuple[int, ...]) -> None:
    """Raise UserError if ``augment`` is a key of ``AUGMENTATIONS`` and events are no images."""
    if augment and len(event_shape) != 3:
        raise UserError(
            f"augment must be none for events that are not (C, H, W); got {augment} for "
            f"{tuple(event_shape)}"
        )


def _uniform(images: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` numbers in [0, 1) for each image, ``(B,)`` each."""
    like = images.new_empty(len(images), count, dtype=torch.float32)
    return drawn_for(like, torch.rand_like).unbind(1)


def _step(uniform: Tensor) -> Tensor:
    return (3 * uniform).long() - 1


def _moved(
    images: Tensor, turned: Tensor, down: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Output pixel (h, w) is pixel (h - down, w - right) of the image, turned or not."""
    batch, channels, height, width = images.shape

    def axis(size: int) -> Tensor:
        return torch.arange(size, device=images.device)

    rows = axis(height)[None] if down is None else axis(height) - down[:, None]
    columns = axis(width)[None] if right is None else axis(width) - right[:, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    columns = torch.where(turned[:, None], width - 1 - columns, columns)
    return images[
        axis(batch)[:, None, None, None],
        axis(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
