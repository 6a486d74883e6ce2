"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

AUTO, MIN = "auto", "min"
_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_budget(value: int | str) -> int | str:
    """Bytes, ``"auto"`` or ``"min"``.

    Args:
        value: a number of bytes, a string with a unit such as ``"4GiB"`` or ``"3.5 GB"``,
            ``"auto"`` (what the device has free, less a tenth) or ``"min"`` (the smallest
            exact plan there is).

    Raises:
        ValueError: for anything else, naming the value and what is allowed.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text in (AUTO, MIN):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", text)
        if match and match[2] in _UNITS:
            count = float(match[1]) * _UNITS[match[2]]
            if 1 <= count < math.inf:
                return int(count)
    raise ValueError(
        f"memory_budget is {value!r}; allowed: a number of bytes above 0, a string such as "
        f"'4GiB' or '512 MiB', 'auto', 'min'"
    )


def bytes_text(count: float) -> str:
    """Bytes in MiB or GiB."""
    mib = count / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"
