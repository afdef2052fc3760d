# SPDX-License-Identifier: Apache-2.0
"""Free page reporting: discard first, acknowledge after.

*Memory Balloon Device / Device Operation / Free Page Reporting*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.pages import coalesce
from vballoon.skipmap import Provenance
from vballoon_spec.virtio.balloon import PFN_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.balloon.counters import Counters
    from vballoon.memory import Discarder
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("ReportQueue", "whole_pages")

_PAGE_MASK = np.uint64((1 << PFN_SHIFT) - 1)
_SHIFT = np.uint64(PFN_SHIFT)


def whole_pages(
    addr: NDArray[np.uint64], length: NDArray[np.uint32]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """The pages wholly inside each ``[addr, addr + length)``, in bytes, both of shape (n,).

    Returns first and end page numbers (uint64[n], half open, possibly empty), and how many of
    the ranges did not begin and end on a page boundary.
    """
    end = addr + length
    odd = int(np.count_nonzero((addr | end) & _PAGE_MASK))
    first = (addr + _PAGE_MASK) >> _SHIFT
    return first, np.maximum(end >> _SHIFT, first), odd


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
        start, end, odd = whole_pages(batch.addr[batch.writable], batch.len[batch.writable])
        self._counters.bad_report += odd + int(np.count_nonzero(~batch.writable))
        start, end = coalesce(start, end)
        self._counters.reported_pages += int((end - start).sum())
        if discard and self._discarder.enabled:
            self._counters.discarded_bytes += self._discarder.discard(
                batch.memory, start << _SHIFT, end << _SHIFT
            )
            skipmap.set_ranges(Provenance.REPORTED, start, end)
        else:
            self._counters.reports_kept += len(batch)
        queue.give(batch.ids)
