"""How much memory there is, asked before a factorisation takes it."""

from __future__ import annotations

from pathlib import Path

# Less is not worth asking the system for.
_TRIFLE = 10_000_000
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB")


def available_bytes() -> int | None:
    """Memory of this machine, or of this container, that nothing uses yet; None if unknown."""
    known = [n for n in (_machine(), _container()) if n is not None]
    return min(known) if known else None


def require_memory(needed: int, what: str, way_out: str) -> None:
    """Raise MemoryError, naming ``what`` and ``way_out``, if ``needed`` bytes are not available."""
    available = available_bytes() if needed > _TRIFLE else None
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs {in_units(needed)}, and {in_units(available)} are available; {way_out}"
        )


def in_units(count: float) -> str:
    """A number of bytes for people.

    >>> in_units(19_000_000), in_units(12)
    ('19.0 MB', '12 bytes')
    """
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {_UNITS[power]}" if power else f"{count:.0f} bytes"


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)


def _container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no such limit
        return None
