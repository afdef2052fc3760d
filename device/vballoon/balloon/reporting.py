# SPDX-License-Identifier: Apache-2.0
"""Free page reporting: discard first, acknowledge after.

Label: *Memory Balloon Device / Device Operation / Free Page Reporting*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vballoon.memory.ranges import blocks
from vballoon.skipmap import Provenance

if TYPE_CHECKING:
    from vballoon.balloon.counters import Counters
    from vballoon.memory import Discarder
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("ReportQueue",)


class ReportQueue:
    """Serves reporting_vq: device-writable descriptors, each a range of free pages."""

    def __init__(self, counters: Counters, discarder: Discarder) -> None:
        self._counters = counters
        self._discarder = discarder

    def handle(
        self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap, *, discard: bool
    ) -> None:
        """Discard the reported pages, then return the buffers to the driver.

        If *discard* is false, only return the buffers.  That is the case when the guest expects
        free pages to keep a poison value, because a hole reads as zeros.
        """
        pages, bad = blocks(batch.addr, batch.len, batch.writable)
        self._counters.bad_report += bad
        self._counters.reported_pages += pages.total
        if discard and self._discarder.enabled:
            self._counters.discarded_bytes += self._discarder.discard(batch.memory, pages.bytes())
            skipmap.set_ranges(Provenance.REPORTED, pages)
        else:
            self._counters.reports_kept += len(batch)
        queue.give(batch.ids)
