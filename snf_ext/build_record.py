"""What the build left in the package about itself, and what it says about a failed import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

RECORD = Path(__file__).with_name("_build.json")


class BuildRecord(TypedDict):
    """``reason``: why no library was built (None where one was); ``torch``: compiled against."""

    reason: str | None
    torch: str | None


def read_build_record() -> BuildRecord | None:
    """The record, or None in a source tree that was never built."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"reason": record.get("reason"), "torch": record.get("torch")}


def release(version: str) -> str:
    """The part of a torch version that decides whether a library compiled against it fits.

    >>> release("2.13.0+cpu")
    '2.13'
    """
    return ".".join(version.split("+")[0].split(".")[:2])


def other_torch(running: str) -> str | None:
    """Why the library must not be loaded beside the torch that runs, None where it may.

    A library compiled against another release of torch may load all the same, and then read torch's
    structures wrongly; so it is not tried.
    """
    record = read_build_record()
    if record is None or record["reason"] or not record["torch"]:
        return None  # no library to speak of; importing it says why
    if release(record["torch"]) == release(running):
        return None
    return f"it was built against torch {record['torch']} and torch {running} is running"


def why_not_loaded(error: ImportError, running: str) -> str:
    """One line that says why the compiled library is not there, for people.

    Args:
        error: what importing the library raised.
        running: the version of torch that runs now.
    """
    record = read_build_record()
    if record is None:
        return f"{RECORD.parent} was never built"
    if record["reason"]:
        return f"it was not built: {record['reason']}"
    built = record["torch"]
    if built and built != running:  # such as a build with CUDA and one without
        return f"it was built against torch {built} and torch {running} is running ({error})"
    return str(error)
