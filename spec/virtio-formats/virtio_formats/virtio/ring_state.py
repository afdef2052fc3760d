# SPDX-License-Identifier: Apache-2.0
"""Where a virtqueue stopped, as it is kept while no process serves it.

Ours, not a standard's; little-endian.  Both transports' states contain one of these for each ring.
"""

from __future__ import annotations

import enum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("DETAIL_SIZE", "RULE_SIZE", "RingFlag", "RingRecordFormat")

RULE_SIZE = 32
"""Bytes for the name of the rule that the driver broke, filled with zeroes."""
DETAIL_SIZE = 128
"""Bytes for the text that says how, filled with zeroes."""


class RingFlag(enum.IntFlag):
    """What is set in ``flags``."""

    POSITION = 1
    """The ring has run, and the position is valid."""
    BROKEN = 2
    """The ring was stopped because the driver broke a rule."""
    AVAIL_WRAP = 4
    """Packed rings: the driver's wrap counter at the next available slot."""
    USED_WRAP = 8
    """Packed rings: the device's wrap counter at the next used slot."""


class RingRecordFormat(WireStruct):
    """One ring: its position, why it is broken, and its counters."""

    flags: int
    avail: int
    used: int
    outstanding: int
    reserved: int = 0
    taken: int
    given: int
    notified: int
    kicked: int
    rule: bytes
    detail: bytes

    SUBCON = c.Struct(
        "flags" / c.Int32ul,
        "avail" / c.Int16ul,
        "used" / c.Int16ul,
        "outstanding" / c.Int32ul,
        "reserved" / c.Int32ul,
        "taken" / c.Int64ul,
        "given" / c.Int64ul,
        "notified" / c.Int64ul,
        "kicked" / c.Int64ul,
        "rule" / c.Bytes(RULE_SIZE),
        "detail" / c.Bytes(DETAIL_SIZE),
    )
