"""Checks of sizes that several bijections share."""

from __future__ import annotations

from torch import Tensor


def checked_event_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """``event_shape`` as a tuple, or ValueError unless its sizes are positive."""
    shape = tuple(event_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"event_shape must have positive sizes; got {list(shape)}")
    return shape


def checked_size(name: str, size: int, smallest: int = 1) -> int:
    """``size``, or ValueError unless it is at least ``smallest``."""
    if size < smallest:
        raise ValueError(f"{name} must be at least {smallest}; got {size}")
    return size


def check_events(x: Tensor, name: str, event_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` is a batch of events of ``event_shape``."""
    if x.dim() < 1 or tuple(x.shape[1:]) != event_shape:
        raise ValueError(
            f"{name} must have shape [B, ...] with events {list(event_shape)}; got {list(x.shape)}"
        )


def check_channels(x: Tensor, name: str, channels: int) -> None:
    """Raise ValueError unless ``x`` is ``(B, C, ...)`` with C = ``channels``."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{name} must have shape [B, C, ...] with C = {channels}; got {list(x.shape)}"
        )


def check_context(context: Tensor | None, batch: int, features: int, name: str = "context") -> None:
    """Raise ValueError unless ``context`` is ``(B, features)``, or None where ``features`` is 0."""
    if not features:
        if context is not None:
            raise ValueError(
                f"{name} must not be given where context_features are 0; got {_got(context)}"
            )
    elif context is None or list(context.shape) != [batch, features]:
        raise ValueError(
            f"{name} must have shape [B, K] = [{batch}, {features}]; got {_got(context)}"
        )


def _got(context: Tensor | None) -> str:
    return "none" if context is None else str(list(context.shape))
