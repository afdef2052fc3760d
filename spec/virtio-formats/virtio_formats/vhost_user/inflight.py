# SPDX-License-Identifier: Apache-2.0
"""The record of buffers in flight ("Inflight I/O tracking", vhost-user.rst, QEMU 11.1.3).

The buffer has one region for each queue, in order.  A region is a head followed by one descriptor
state for each descriptor.  The standard says that a region *can* have this layout: only back-ends
read it, and a common layout lets another back-end take over.

``QueueRegionPacked`` is a C struct: the compiler adds three bytes of padding before its array,
after the seven that the declaration names, because ``DescStatePacked`` holds 64-bit numbers.
"""

from __future__ import annotations

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "REGION_ALIGNMENT",
    "REGION_VERSION",
    "DescStatePacked",
    "DescStateSplit",
    "QueueRegionPacked",
    "QueueRegionSplit",
    "queue_region_size",
)

REGION_VERSION = 1
"""The version of both layouts; 0 means that the region was never written."""

REGION_ALIGNMENT = 64
"""Each queue's region is rounded up to a multiple of this many bytes, so that no two share a cache
line.  The standard does not require it; DPDK and libvhost-user do the same."""


class DescStateSplit(WireStruct):
    """DescStateSplit."""

    inflight: int
    padding: list[int]
    next: int
    counter: int

    SUBCON = c.Struct(
        "inflight" / c.Int8un,
        "padding" / c.Array(5, c.Int8un),
        "next" / c.Int16un,
        "counter" / c.Int64un,
    )


class QueueRegionSplit(WireStruct):
    """QueueRegionSplit, without its array ``desc`` of :class:`DescStateSplit`."""

    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int

    SUBCON = c.Struct(
        "features" / c.Int64un,
        "version" / c.Int16un,
        "desc_num" / c.Int16un,
        "last_batch_head" / c.Int16un,
        "used_idx" / c.Int16un,
    )


class DescStatePacked(WireStruct):
    """DescStatePacked."""

    inflight: int
    padding: int
    next: int
    last: int
    num: int
    counter: int
    id: int
    flags: int
    len: int
    addr: int

    SUBCON = c.Struct(
        "inflight" / c.Int8un,
        "padding" / c.Int8un,
        "next" / c.Int16un,
        "last" / c.Int16un,
        "num" / c.Int16un,
        "counter" / c.Int64un,
        "id" / c.Int16un,
        "flags" / c.Int16un,
        "len" / c.Int32un,
        "addr" / c.Int64un,
    )


class QueueRegionPacked(WireStruct):
    """QueueRegionPacked, without its array ``desc`` of :class:`DescStatePacked`."""

    features: int
    version: int
    desc_num: int
    free_head: int
    old_free_head: int
    used_idx: int
    old_used_idx: int
    used_wrap_counter: int
    old_used_wrap_counter: int
    padding: list[int]

    SUBCON = c.Struct(
        "features" / c.Int64un,
        "version" / c.Int16un,
        "desc_num" / c.Int16un,
        "free_head" / c.Int16un,
        "old_free_head" / c.Int16un,
        "used_idx" / c.Int16un,
        "old_used_idx" / c.Int16un,
        "used_wrap_counter" / c.Int8un,
        "old_used_wrap_counter" / c.Int8un,
        "padding" / c.Array(7 + 3, c.Int8un),
    )


def queue_region_size(queue_size: int, *, packed: bool) -> int:
    """Return the size in bytes of the region of a queue with *queue_size* descriptors."""
    head = QueueRegionPacked.SIZE if packed else QueueRegionSplit.SIZE
    desc = DescStatePacked.SIZE if packed else DescStateSplit.SIZE
    size = head + queue_size * desc
    return size + -size % REGION_ALIGNMENT
