# SPDX-License-Identifier: Apache-2.0
"""Guest memory: regions, translation and bounds checks, discarding, holes, the dirty log.

The only room that maps guest memory or calls the kernel about it.  Rooms above it get arrays that
have been checked.
"""

from __future__ import annotations

from vballoon.memory.dirty_log import VHOST_LOG_PAGE, BitmapLog, DirtyLog
from vballoon.memory.discard import Discarder
from vballoon.memory.holes import data_extents, file_extents, resident_bytes
from vballoon.memory.pages import PAGE_SHIFT, PAGE_SIZE
from vballoon.memory.ranges import ByteRanges, PageRanges
from vballoon.memory.regions import MemoryRegion, RemoteMemory
from vballoon.memory.table import GuestMemory

__all__ = (
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "VHOST_LOG_PAGE",
    "BitmapLog",
    "ByteRanges",
    "DirtyLog",
    "Discarder",
    "GuestMemory",
    "MemoryRegion",
    "PageRanges",
    "RemoteMemory",
    "data_extents",
    "file_extents",
    "resident_bytes",
)
