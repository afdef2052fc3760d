# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write and read them, and the limits for a machine's targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vballoon.errors import UsageError

__all__ = ("VALUE_MIN", "Limits", "parse_limits", "parse_size", "size_text")

VALUE_MIN = 1 << 20
"""Targets below this are a number of MiB given as bytes."""
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


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in bytes that the operator gives for a machine; None: not given."""

    minimum: int | None = None
    maximum: int | None = None
    memory: int | None = None
    """The guest's memory (QEMU's ``-m``)."""


def parse_limits(options: Mapping[str, Any]) -> Limits:
    """Return the limits in *options* (``min``, ``max``, ``memory``).  Raise UsageError."""
    values: dict[str, int] = {}
    for name in ("min", "max", "memory"):
        if options.get(name) is None:
            continue
        try:
            values[name] = parse_size(str(options[name]))
        except (ValueError, OverflowError):
            raise UsageError(
                f"{name}: {options[name]!r} is not a size; write it as 512M or 2G"
            ) from None
        if values[name] < VALUE_MIN:
            raise UsageError(f"{name}: {options[name]} is less than 1 MiB; write it as 512M or 2G")
    limits = Limits(values.get("min"), values.get("max"), values.get("memory"))
    if limits.maximum is not None and (limits.minimum or 0) > limits.maximum:
        raise UsageError("min is above max")
    return limits
