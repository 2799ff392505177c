"""Random numbers that depend on names and numbers alone, never on what ran before.

A run that resumes at epoch 7 draws what an uninterrupted run draws at epoch 7, because every
use has its own seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2^63)`` from integers and names; different parts, unrelated seeds.

    >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1)
    True
    >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 2)
    False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Run a block under its own seed and leave the caller's random numbers untouched.

    >>> with seeded(torch.device("cpu"), 0, "evaluate"):
    ...     a = torch.rand(3)
    >>> with seeded(torch.device("cpu"), 0, "evaluate"):
    ...     torch.equal(a, torch.rand(3))
    True
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*parts))
        yield
