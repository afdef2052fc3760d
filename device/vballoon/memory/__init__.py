# SPDX-License-Identifier: Apache-2.0
"""Guest memory: regions, translation and bounds checks, discarding, holes, the dirty log.

The only room that maps guest memory or calls the kernel about it.  Everything above it gets
arrays that have been checked.
"""

from __future__ import annotations

from vballoon.memory.dirty_log import VHOST_LOG_PAGE, BitmapLog, DirtyLog
from vballoon.memory.discard import Discarder
from vballoon.memory.holes import data_extents
from vballoon.memory.regions import PAGE_SIZE, MemoryRegion, RemoteMemory
from vballoon.memory.table import GuestMemory

__all__ = (
    "PAGE_SIZE",
    "VHOST_LOG_PAGE",
    "BitmapLog",
    "DirtyLog",
    "Discarder",
    "GuestMemory",
    "MemoryRegion",
    "RemoteMemory",
    "data_extents",
)
