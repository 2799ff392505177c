"""Derivatives by central differences."""

from __future__ import annotations

import torch


def directional(value, leaf, step=1e-5):
    """Derivative of ``value()`` along a random direction of ``leaf``, by central differences."""
    direction, kept = torch.randn_like(leaf), leaf.detach().clone()
    ends = []
    for sign in (1, -1):
        leaf.data.copy_(kept + sign * step * direction)
        with torch.no_grad():
            ends.append(value().item())
    leaf.data.copy_(kept)
    return (ends[0] - ends[1]) / (2 * step), direction
