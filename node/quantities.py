"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

__all__ = ["count", "duration", "size"]


def count(number: float) -> str:
    """In full below ten thousand, then 12.3k, 1.23M and so on."""
    return f"{number:,.0f}" if number < 9_999.5 else _scaled(number, ("k", "M", "G", "T"))


def size(num_bytes: float) -> str:
    """In decimal units, as network speeds use them."""
    return f"{num_bytes:.0f} B" if num_bytes < 999.5 else _scaled(num_bytes, (" kB", " MB", " GB", " TB", " PB"))


def duration(seconds: float) -> str:
    """In the unit that leaves at least two of it: 95 s, 12 min, 3 h, 4 days."""
    for limit_s, unit_s, unit in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit_s:
            return f"{max(seconds, 0.0) / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """`number` in the smallest unit in which it stays below a thousand, with three digits."""
    for power, unit in enumerate(units, start=1):
        scaled = number / 1000**power
        if scaled < 999.5:
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number / 1000 ** len(units):,.0f}{units[-1]}"
