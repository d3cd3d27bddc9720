"""Sizes in bytes, from and to text."""

from __future__ import annotations

import math
import re

GIB = 1 << 30
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_PATTERN = re.compile(r"\s*([0-9]*)(?:\.([0-9]+))?\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)


def parse_size(value: int | float | str) -> int:
    """Bytes that `value` names: numbers are GiB, text carries its unit.

    >>> parse_size("6 GB"), parse_size("6 GiB"), parse_size(0.5)
    (6000000000, 6442450944, 536870912)

    Raises ValueError for text without a unit that is known, and for what is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"a size is a number of GiB or text such as '6 GB', not {value!r}")
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        whole, part, name = match.groups(default="") if match else ("", "", "")
        unit = _UNITS.get(name.lower())
        if unit is None or not whole + part:
            raise ValueError(
                f"cannot read the size {value!r}; write a number and one of "
                "B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
            )
        return int(whole + part) * unit // 10 ** len(part)  # exact: no float holds every size
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"a size must be finite and not negative, got {value!r}")
    return math.floor(value * GIB)


def format_size(n: int) -> str:
    """`n` bytes as text with three or four digits: ``5.4 MiB``."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
