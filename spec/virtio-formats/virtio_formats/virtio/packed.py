# SPDX-License-Identifier: Apache-2.0
"""The packed virtqueue: one ring of descriptors and two event suppression structures.

Read from the virtio specification, git revision 15f488c1, packed-ring.tex; each declaration names
its label.  All fields are little-endian.
"""

from __future__ import annotations

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "EVENT_ALIGN",
    "EVENT_FLAGS_MASK",
    "EVENT_OFFSET_MASK",
    "EVENT_WRAP_SHIFT",
    "QUEUE_SIZE_MAX",
    "RING_ALIGN",
    "RING_EVENT_FLAGS_DESC",
    "RING_EVENT_FLAGS_DISABLE",
    "RING_EVENT_FLAGS_ENABLE",
    "VIRTQ_DESC_F_AVAIL",
    "VIRTQ_DESC_F_INDIRECT",
    "VIRTQ_DESC_F_NEXT",
    "VIRTQ_DESC_F_USED",
    "VIRTQ_DESC_F_WRITE",
    "PvirtqDesc",
    "PvirtqEventSuppress",
    "ring_size",
)

QUEUE_SIZE_MAX = 32768
"""Descriptors, 2^15; any number up to it (label: … / Packed Virtqueues)."""

RING_ALIGN, EVENT_ALIGN = 16, 4
"""Alignment in bytes (label: Packed Virtqueues / Structure Size and Alignment)."""

VIRTQ_DESC_F_NEXT = 1
"""The list continues in the next slot (Packed Virtqueues / Next Flag: Descriptor Chaining)."""
VIRTQ_DESC_F_WRITE = 2
"""Device-writable; in a used descriptor: data was written (label: … / Write Flag)."""
VIRTQ_DESC_F_INDIRECT = 4
"""The element is a table of descriptors (label: … / Indirect Flag: Scatter-Gather Support)."""
VIRTQ_DESC_F_AVAIL = 1 << 7
"""Available bit (label: Packed Virtqueues / Driver and Device Ring Wrap Counters)."""
VIRTQ_DESC_F_USED = 1 << 15
"""Used bit (same label)."""

RING_EVENT_FLAGS_ENABLE = 0
"""Notify always (label: Packed Virtqueues / Driver and Device Event Suppression)."""
RING_EVENT_FLAGS_DISABLE = 1
"""Notify never."""
RING_EVENT_FLAGS_DESC = 2
"""Notify for one descriptor; only with VIRTIO_F_EVENT_IDX.  3 is reserved."""
EVENT_FLAGS_MASK = 3
"""The bits of ``flags`` in an event suppression structure that mean something."""
EVENT_OFFSET_MASK = 0x7FFF
"""``desc_event_off`` in ``desc``: offset in the ring, in descriptors."""
EVENT_WRAP_SHIFT = 15
"""``desc_event_wrap`` in ``desc``: the wrap counter, one bit."""


class PvirtqDesc(WireStruct):
    """``struct pvirtq_desc`` (label: … / Packed Virtqueues / The Virtqueue Descriptor Format)."""

    addr: int
    len: int
    id: int
    flags: int

    SUBCON = c.Struct("addr" / c.Int64ul, "len" / c.Int32ul, "id" / c.Int16ul, "flags" / c.Int16ul)


class PvirtqEventSuppress(WireStruct):
    """``struct pvirtq_event_suppress`` (label: … / Event Suppression Structure Format)."""

    desc: int
    flags: int

    SUBCON = c.Struct("desc" / c.Int16ul, "flags" / c.Int16ul)


def ring_size(queue_size: int) -> int:
    """Bytes of the descriptor ring."""
    return PvirtqDesc.SIZE * queue_size
