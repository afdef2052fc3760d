# SPDX-License-Identifier: Apache-2.0
"""The buffer that outlives a crash ("Inflight I/O tracking", vhost-user.rst, QEMU 11.1.3).

One region for each queue, one after the other, each a head and as many descriptor states as the
queue has descriptors.  The standard says that a region *can* be laid out so: only the back-end
reads it, and it is written down so that another back-end can take over.

``QueueRegionPacked`` is a C struct: the compiler puts three bytes more in front of its array than
the seven that the declaration names, because ``DescStatePacked`` holds 64-bit numbers.
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
"""The version of both layouts; 0 means that the region was never written to."""

REGION_ALIGNMENT = 64
"""Bytes to which each queue's region is rounded up, so that no two share a cache line.  Ours: the
standard does not say, and DPDK and libvhost-user do the same."""


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
    """Bytes that the region of one queue of *queue_size* descriptors takes up."""
    head = QueueRegionPacked.SIZE if packed else QueueRegionSplit.SIZE
    desc = DescStatePacked.SIZE if packed else DescStateSplit.SIZE
    size = head + queue_size * desc
    return size + -size % REGION_ALIGNMENT
