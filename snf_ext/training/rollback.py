"""Going back to the last good checkpoint, with a stronger hold on the learned inverses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import Diverged

FACTOR = 10.0
ATTEMPTS = 3


def roll_back(path: Path, failure: Diverged, weight: float) -> dict[str, Any]:
    """The checkpoint at ``path`` to go on from after ``failure``, with lambda 10 times ``weight``.

    The checkpoint is rewritten with one more row in its part ``rollbacks``,

        epoch         finished epochs of the checkpoint gone back to
        step, cause   where the run failed, and why
        recon_weight  lambda from there on

    so that a run which is cut off and resumed goes on with the same lambda. One line on stderr
    tells of it.

    Raises:
        Diverged: three rollbacks to this checkpoint did not lead to the next one. The message has
            them all.
    """
    content = checkpoint.load(path, resume=True)
    earlier = content.get("rollbacks", [])
    epoch = content["epoch"]
    here = [row for row in earlier if row["epoch"] == epoch]
    if len(here) >= ATTEMPTS:
        tried = ", ".join(
            f"lambda {row['recon_weight']:g} after {row['cause']} in step {row['step']}"
            for row in here
        )
        raise Diverged(f"{failure}; {len(here)} rollbacks did not help: {tried}") from failure
    row = {
        "epoch": epoch,
        "step": failure.step,
        "cause": failure.cause,
        "recon_weight": FACTOR * weight,
    }
    content["rollbacks"] = [*earlier, row]
    checkpoint.save(path, content)
    print(
        f"training diverged: {failure.cause} in step {failure.step}; "
        f"going on from epoch {epoch} with lambda {row['recon_weight']:g} in place of {weight:g}",
        file=sys.stderr,
    )
    return content
