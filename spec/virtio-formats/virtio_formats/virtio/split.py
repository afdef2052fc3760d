# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue: descriptor table, available ring, used ring.

Read from the virtio specification, git revision 15f488c1, split-ring.tex; each declaration names
its label.  All fields are little-endian.
"""

from __future__ import annotations

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "AVAIL_ALIGN",
    "AVAIL_IDX_OFFSET",
    "AVAIL_RING_OFFSET",
    "DESC_ALIGN",
    "QUEUE_SIZE_MAX",
    "USED_ALIGN",
    "USED_IDX_OFFSET",
    "USED_RING_OFFSET",
    "VIRTQ_AVAIL_F_NO_INTERRUPT",
    "VIRTQ_DESC_F_INDIRECT",
    "VIRTQ_DESC_F_NEXT",
    "VIRTQ_DESC_F_WRITE",
    "VIRTQ_USED_F_NO_NOTIFY",
    "VirtqAvailHeader",
    "VirtqDesc",
    "VirtqUsedElem",
    "VirtqUsedHeader",
    "avail_event_offset",
    "avail_size",
    "desc_size",
    "used_event_offset",
    "used_size",
)

QUEUE_SIZE_MAX = 32768
"""Descriptors; the highest power of two that 16 bits hold (label: … / Virtqueues)."""

DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4
"""Alignment in bytes of the three areas (label: … / Virtqueues, the table of parts)."""

VIRTQ_DESC_F_NEXT = 1
"""The buffer continues at ``next``."""
VIRTQ_DESC_F_WRITE = 2
"""Device-writable; otherwise device-readable."""
VIRTQ_DESC_F_INDIRECT = 4
"""The buffer is a table of descriptors."""

VIRTQ_AVAIL_F_NO_INTERRUPT = 1
"""In the available ring's flags: the driver wants no used buffer notifications."""
VIRTQ_USED_F_NO_NOTIFY = 1
"""In the used ring's flags: the device wants no available buffer notifications."""


class VirtqDesc(WireStruct):
    """``struct virtq_desc`` (label: … / Virtqueues / The Virtqueue Descriptor Table)."""

    addr: int
    len: int
    flags: int
    next: int

    SUBCON = c.Struct(
        "addr" / c.Int64ul, "len" / c.Int32ul, "flags" / c.Int16ul, "next" / c.Int16ul
    )


class VirtqAvailHeader(WireStruct):
    """The head of ``struct virtq_avail`` (label: … / Virtqueues / The Virtqueue Available Ring)."""

    flags: int
    idx: int

    SUBCON = c.Struct("flags" / c.Int16ul, "idx" / c.Int16ul)


class VirtqUsedHeader(WireStruct):
    """The head of ``struct virtq_used`` (label: … / Virtqueues / The Virtqueue Used Ring)."""

    flags: int
    idx: int

    SUBCON = c.Struct("flags" / c.Int16ul, "idx" / c.Int16ul)


class VirtqUsedElem(WireStruct):
    """``struct virtq_used_elem`` (label: … / Virtqueues / The Virtqueue Used Ring)."""

    id: int
    len: int

    SUBCON = c.Struct("id" / c.Int32ul, "len" / c.Int32ul)


AVAIL_IDX_OFFSET = 2
"""Bytes from the start of the available ring to ``idx``."""
AVAIL_RING_OFFSET = VirtqAvailHeader.SIZE
"""Bytes from the start of the available ring to ``ring[0]``."""
USED_IDX_OFFSET = 2
"""Bytes from the start of the used ring to ``idx``."""
USED_RING_OFFSET = VirtqUsedHeader.SIZE
"""Bytes from the start of the used ring to ``ring[0]``."""


def desc_size(queue_size: int) -> int:
    """Bytes of the descriptor table."""
    return VirtqDesc.SIZE * queue_size


def used_event_offset(queue_size: int) -> int:
    """Bytes from the start of the available ring to ``used_event``."""
    return AVAIL_RING_OFFSET + 2 * queue_size


def avail_event_offset(queue_size: int) -> int:
    """Bytes from the start of the used ring to ``avail_event``."""
    return USED_RING_OFFSET + VirtqUsedElem.SIZE * queue_size


def avail_size(queue_size: int, event_idx: bool = True) -> int:
    """Bytes of the available ring, with or without ``used_event``."""
    return used_event_offset(queue_size) + (2 if event_idx else 0)


def used_size(queue_size: int, event_idx: bool = True) -> int:
    """Bytes of the used ring, with or without ``avail_event``."""
    return avail_event_offset(queue_size) + (2 if event_idx else 0)
