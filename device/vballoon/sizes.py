# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write and read them."""

from __future__ import annotations

__all__ = ("parse_size", "size_text")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def size_text(count: float) -> str:
    """Return *count* bytes in readable form, for example ``1.5 GiB``."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"


def parse_size(text: str) -> int:
    """Return the bytes in *text*: ``2147483648``, ``0x80000000``, ``2G``.  Raise ValueError."""
    number = text.strip()
    for suffix in ("iB", "B"):
        number = number.removesuffix(suffix)
    unit = number[-1:].upper()
    if number.lower().startswith("0x") or unit not in _UNITS or not unit:
        return int(number, 0)
    value = float(number[:-1]) * _UNITS[unit]
    if value != int(value):
        raise ValueError(f"{text} is not a whole number of bytes")
    return int(value)
