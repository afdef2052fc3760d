# SPDX-License-Identifier: Apache-2.0
"""The rules of a virtqueue that a driver can break, by name.

A :class:`~vballoon.errors.QueueError`, the log and the ``QUEUE_BROKEN`` event contain the name, and
tests compare it.  Labels are those of the virtio specification, git revision 15f488c1 ("…" means
"Basic Facilities of a Virtio Device / Virtqueues").
"""

from __future__ import annotations

from typing import Final

__all__ = ("RULES",)

AVAIL_IDX_JUMP: Final = "avail-idx-jump"
HEAD_RANGE: Final = "head-range"
BUFFER_REUSED: Final = "buffer-reused"
RING_OVERRUN: Final = "ring-overrun"
DESC_CHAIN_LOOP: Final = "desc-chain-loop"
DESC_NEXT_RANGE: Final = "desc-next-range"
DESC_ADDRESS: Final = "desc-address"
DESC_ORDER: Final = "desc-order"
DESC_LENGTH_OVERFLOW: Final = "desc-length-overflow"
DESC_NOT_AVAILABLE: Final = "desc-not-available"
CHAIN_TOO_LONG: Final = "chain-too-long"
INDIRECT_NOT_NEGOTIATED: Final = "indirect-not-negotiated"
INDIRECT_NESTED: Final = "indirect-nested"
INDIRECT_WITH_NEXT: Final = "indirect-with-next"
INDIRECT_SIZE: Final = "indirect-size"
INDIRECT_ADDRESS: Final = "indirect-address"
RING_ADDRESS: Final = "ring-address"
RING_SIZE: Final = "ring-size"
MEMORY_LOST: Final = "memory-lost"

RULES: Final[dict[str, str]] = {
    AVAIL_IDX_JUMP: (
        "the available index runs ahead of the device by more than the queue size, or went back "
        "(… / The Virtqueue Available Ring)"
    ),
    HEAD_RANGE: "an available ring entry is not a descriptor of the table (…)",
    BUFFER_REUSED: (
        "a head (split) or buffer id (packed) is made available while the device still holds it (…)"
    ),
    RING_OVERRUN: (
        "packed: more descriptors made available than the ring has free "
        "(Packed Virtqueues / The Virtqueue Descriptor Table)"
    ),
    DESC_CHAIN_LOOP: (
        "a chain returns to one of its own descriptors (… / The Virtqueue Descriptor Table)"
    ),
    DESC_NEXT_RANGE: "next points outside the table (… / The Virtqueue Descriptor Table)",
    DESC_ADDRESS: "a buffer is not entirely in guest memory (… / The Virtqueue Descriptor Table)",
    DESC_ORDER: "a readable descriptor follows a writable one (… / Message Framing)",
    DESC_LENGTH_OVERFLOW: ("a chain of more than 2^32 bytes (… / The Virtqueue Descriptor Table)"),
    DESC_NOT_AVAILABLE: (
        "packed: a list continues in a descriptor that was not made available "
        "(Packed Virtqueues / Next Flag: Descriptor Chaining)"
    ),
    CHAIN_TOO_LONG: "a chain of more descriptors than the queue size (… / Indirect Descriptors)",
    INDIRECT_NOT_NEGOTIATED: (
        "an indirect descriptor without VIRTIO_F_INDIRECT_DESC (… / Indirect Descriptors)"
    ),
    INDIRECT_NESTED: "an indirect descriptor in an indirect table (… / Indirect Descriptors)",
    INDIRECT_WITH_NEXT: "INDIRECT and NEXT in one chain link (… / Indirect Descriptors)",
    INDIRECT_SIZE: (
        "an indirect table of no bytes or not of whole descriptors (… / Indirect Descriptors)"
    ),
    INDIRECT_ADDRESS: "an indirect table outside guest memory (… / Indirect Descriptors)",
    RING_ADDRESS: "an area of the ring is misaligned or outside guest memory (…)",
    RING_SIZE: "a queue size that the format does not allow (…)",
    MEMORY_LOST: (
        "an access to guest memory failed: the front-end has truncated its file, or the host has "
        "no memory left for it (no rule of the standard)"
    ),
}
"""Name of every rule to the violation that it names."""
