# SPDX-License-Identifier: Apache-2.0
"""The packed state of a balloon: what outlives a process, a connection, or a host.

A header (:class:`StateHeader`), then ``nr_rounds`` records (:class:`StateRound`), then
``nr_ballooned`` and ``nr_reported`` page ranges (``WalkRange``).  It is vballoon's own: the
standard leaves the migration format of a device to the device.

Hinted and walked bits are not in it: they end with the process (the design's sections 5 and 10).
The statistics buffer that the driver keeps in the queue is not in it either: it is in the record of
buffers in flight, and the ring hands it out again.
"""

from __future__ import annotations

import zlib

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "ROLE_CODES",
    "STATE_MAGIC",
    "STATE_VERSION",
    "StateHeader",
    "StateRound",
    "state_checksum",
)

STATE_MAGIC = 0x4C4C4256
"""``VBLL``, little-endian."""
STATE_VERSION = 2
"""Raised whenever the layout changes; a reader refuses every other version."""
ROLE_CODES = ("", "inflateq", "deflateq", "statsq", "free_page_vq", "reporting_vq", "walk_vq")
"""Names of the roles in :attr:`StateHeader.roles`, by code; 0: the queue has none."""


class StateHeader(WireStruct):
    """The header; all fields little-endian."""

    magic: int
    version: int
    checksum: int
    """:func:`state_checksum` of the whole state with this field 0."""
    num_pages: int
    """The operator's target: pages that should be in the balloon."""
    actual: int
    poison_val: int
    hint_next_id: int
    walk_next_id: int
    stats_interval: int
    """Seconds between two requests for statistics; 0: none."""
    roles: bytes
    """The code of each queue's role (:data:`ROLE_CODES`)."""
    settled: int
    """1 where the roles are settled for *features*."""
    features: int
    """The negotiated feature word that the roles are settled for."""
    nr_rounds: int
    nr_ballooned: int
    nr_reported: int

    SUBCON = c.Struct(
        "magic" / c.Int32ul,
        "version" / c.Int32ul,
        "checksum" / c.Int32ul,
        "num_pages" / c.Int32ul,
        "actual" / c.Int32ul,
        "poison_val" / c.Int32ul,
        "hint_next_id" / c.Int32ul,
        "walk_next_id" / c.Int32ul,
        "stats_interval" / c.Int32ul,
        "roles" / c.Bytes(8),
        "settled" / c.Int32ul,
        "features" / c.Int64ul,
        "nr_rounds" / c.Int32ul,
        "nr_ballooned" / c.Int32ul,
        "nr_reported" / c.Int32ul,
    )


class StateRound(WireStruct):
    """The latest round of a kind: void once it is restored, but its id is known."""

    id: int
    kind: int
    """0: hint, 1: walk."""
    published_monotonic: int
    published_wall: int
    records: int
    pages: int
    bad_records: int

    SUBCON = c.Struct(
        "id" / c.Int32ul,
        "kind" / c.Int32ul,
        "published_monotonic" / c.Int64ul,
        "published_wall" / c.Int64ul,
        "records" / c.Int64ul,
        "pages" / c.Int64ul,
        "bad_records" / c.Int64ul,
    )


def state_checksum(header: bytes, body: bytes) -> int:
    """Return the CRC-32 of a state.  *header* is packed with a checksum of 0."""
    return zlib.crc32(body, zlib.crc32(header))
