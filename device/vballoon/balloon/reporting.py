# SPDX-License-Identifier: Apache-2.0
"""Free page reporting: discard first, acknowledge after.

*Memory Balloon Device / Device Operation / Free Page Reporting*.
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
        """Discard the reported pages and give the buffers back, in this order.

        With *discard* off (the guest expects free pages to keep a value that a hole does not
        read as) the report is acknowledged and nothing else happens.
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
