# SPDX-License-Identifier: Apache-2.0
"""The traditional memory balloon device: features, queues, configuration space, statistics.

Read from virtio-spec revision 15f488c1, *Device Types / Memory Balloon Device* and its
subsections; statistics tags 10 to 15 are Linux's (``include/uapi/linux/virtio_balloon.h``, since
6.12), which the standard does not list yet.  Feature bit 63 and the last two configuration fields
are this project's walk extension (``spec/vballoon_spec/walk/walk-queue.md``).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "CMD_ID_DONE",
    "CMD_ID_FIRST",
    "CMD_ID_STOP",
    "PFN_SHIFT",
    "VIRTIO_ID_BALLOON",
    "BalloonConfig",
    "BalloonFeature",
    "BalloonStat",
    "StatTag",
    "stat_name",
)

VIRTIO_ID_BALLOON = 5
"""*Memory Balloon Device / Device ID*."""

PFN_SHIFT = 12
"""Page numbers in balloon requests are guest-physical addresses divided by 4096."""

CMD_ID_STOP = 0
CMD_ID_DONE = 1
CMD_ID_FIRST = 2
"""Reserved command ids and the first usable one (*Device Operation / Free Page Hinting*)."""


class BalloonFeature(IntFlag):
    """*Memory Balloon Device / Feature bits*, as masks, and the walk extension's."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    PAGE_REPORTING = 1 << 5
    FREE_PAGE_WALK = 1 << 63


class BalloonConfig(WireStruct):
    """``struct virtio_balloon_config`` with the walk extension (24 bytes, 16 without it).

    ``num_pages``: pages of 4 KiB that the device wants; ``actual``: pages that the driver has
    given (written by the driver); ``free_page_hint_cmd_id``: read-only by the driver;
    ``poison_val``: written by the driver before DRIVER_OK.  (*Device configuration layout*.)
    """

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = CMD_ID_STOP
    poison_val: int = 0
    free_page_walk_cmd_id: int = CMD_ID_STOP
    free_page_walk_min_order: int = 0

    SUBCON = c.Struct(
        "num_pages" / c.Int32ul,
        "actual" / c.Int32ul,
        "free_page_hint_cmd_id" / c.Int32ul,
        "poison_val" / c.Int32ul,
        "free_page_walk_cmd_id" / c.Int32ul,
        "free_page_walk_min_order" / c.Int32ul,
    )


CONFIG_SIZE_STANDARD = 16
"""Bytes of the configuration space without the walk extension."""


class BalloonStat(WireStruct):
    """``struct virtio_balloon_stat``: one 10-byte entry (*Memory Statistics*)."""

    tag: int
    val: int

    SUBCON = c.Struct("tag" / c.Int16ul, "val" / c.Int64ul)


class BalloonPfn(WireStruct):
    """One entry of an inflate or deflate buffer: a page number in units of 4096 bytes."""

    pfn: int

    SUBCON = c.Struct("pfn" / c.Int32ul)


class BalloonCmdId(WireStruct):
    """The 4-byte device-readable buffer that opens or closes a block of hints."""

    cmd_id: int

    SUBCON = c.Struct("cmd_id" / c.Int32ul)


class StatTag(IntEnum):
    """*Memory Statistics Tags*; from 10 on as Linux 6.12 and later send them."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJFLT = 2
    MINFLT = 3
    MEMFREE = 4
    MEMTOT = 5
    AVAIL = 6
    CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9
    OOM_KILL = 10
    ALLOC_STALL = 11
    ASYNC_SCAN = 12
    DIRECT_SCAN = 13
    ASYNC_RECLAIM = 14
    DIRECT_RECLAIM = 15


_STAT_NAMES = {
    StatTag.SWAP_IN: "stat-swap-in",
    StatTag.SWAP_OUT: "stat-swap-out",
    StatTag.MAJFLT: "stat-major-faults",
    StatTag.MINFLT: "stat-minor-faults",
    StatTag.MEMFREE: "stat-free-memory",
    StatTag.MEMTOT: "stat-total-memory",
    StatTag.AVAIL: "stat-available-memory",
    StatTag.CACHES: "stat-disk-caches",
    StatTag.HTLB_PGALLOC: "stat-htlb-pgalloc",
    StatTag.HTLB_PGFAIL: "stat-htlb-pgfail",
    StatTag.OOM_KILL: "stat-oom-kills",
    StatTag.ALLOC_STALL: "stat-alloc-stalls",
    StatTag.ASYNC_SCAN: "stat-async-scans",
    StatTag.DIRECT_SCAN: "stat-direct-scans",
    StatTag.ASYNC_RECLAIM: "stat-async-reclaims",
    StatTag.DIRECT_RECLAIM: "stat-direct-reclaims",
}


def stat_name(tag: StatTag) -> str:
    """Return the name of the statistic in QEMU's ``guest-stats`` property."""
    return _STAT_NAMES[tag]
