# SPDX-License-Identifier: Apache-2.0
"""Inflate and deflate: arrays of 32-bit page numbers.

*Memory Balloon Device / Device Operation*.  Inflated pages are discarded before the buffer is
given back, in merged ranges; deflated ones leave the bitmap before it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.gather import page_ranges, ranges_of
from vballoon.skipmap import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from vballoon.balloon.counters import Counters
    from vballoon.memory import Discarder, PageRanges
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("InflateQueues",)

PFNS_PER_BUFFER_MAX = 16384
"""Page numbers read of one buffer.  Linux sends 256; what a longer buffer holds beyond this is
ignored and counted, so that a buffer of 4 GiB costs the guest more than it costs the host."""

PFNS_AT_ONCE = 1 << 20
"""Page numbers handled in one go: bounds the memory that a full ring of full buffers takes."""


class InflateQueues:
    """Serves inflateq and deflateq."""

    def __init__(self, counters: Counters, discarder: Discarder) -> None:
        self._counters = counters
        self._discarder = discarder

    def inflate(
        self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap, *, tells: bool
    ) -> None:
        """Discard the pages, set their bits, give the buffers back.

        ``tells``: the driver waits before it uses a page again (MUST_TELL_HOST negotiated), so that
        the parts of a huge page may add up, and the page may be left out until it is deflated.
        Without that its deflation may come late: it is then as good as reported, left out while
        it is a hole.
        """
        for pages in self._ranges(batch):
            self._counters.inflated_pages += pages.total
            self._counters.discarded_bytes += self._discarder.discard(
                batch.memory, pages.bytes(), accumulate=tells
            )
            if tells:
                skipmap.set_ranges(Provenance.BALLOONED, pages)
            elif self._discarder.enabled:
                skipmap.set_ranges(Provenance.REPORTED, pages)
        queue.give(batch.ids)

    def deflate(self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap) -> None:
        """Clear the bits first: from the acknowledgement on, the pages may be the guest's."""
        for pages in self._ranges(batch):
            self._counters.deflated_pages += pages.total
            skipmap.clear_ranges(Provenance.BALLOONED, pages)
            self._discarder.undo(batch.memory, pages.bytes())
        queue.give(batch.ids)

    def _ranges(self, batch: ChainBatch) -> Iterator[PageRanges]:
        """Yield the pages of all buffers, in pieces of bounded size."""
        for pages, bad in self._read(batch):
            self._counters.bad_inflate += bad
            yield pages

    def _read(self, batch: ChainBatch) -> Iterator[tuple[PageRanges, int]]:
        size = np.where(batch.writable, 0, batch.len).astype(np.int64)
        if (size & 3).any():
            for i in range(len(batch)):
                yield ranges_of(batch.memory, self._read_odd(batch, i))
            return
        words = self._bounded(batch, size >> 2)
        read = np.flatnonzero(words)
        if not read.size:
            return
        piece = (np.cumsum(words[read]) - 1) // PFNS_AT_ONCE
        cuts = np.flatnonzero(np.diff(piece)) + 1
        for part in np.split(read, cuts) if cuts.size else [read]:
            yield page_ranges(batch.memory, batch.addr[part], words[part])

    def _bounded(self, batch: ChainBatch, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """*words* of each descriptor, cut so that no buffer exceeds its limit."""
        if words.size == len(batch):
            kept = np.minimum(words, PFNS_PER_BUFFER_MAX)
        else:
            before = np.cumsum(words) - words
            chain = np.repeat(np.arange(len(batch)), np.diff(batch.first))
            used = before - before[batch.first[:-1]][chain]
            kept = np.clip(PFNS_PER_BUFFER_MAX - used, 0, words)
        self._counters.bad_inflate += int((words - kept).sum())
        return kept

    def _read_odd(self, batch: ChainBatch, i: int) -> NDArray[np.uint32]:
        """Read a buffer with a page number across two descriptors or with surplus bytes."""
        data = batch.readable(i, 4 * PFNS_PER_BUFFER_MAX)
        surplus = len(data) & 3
        self._counters.bad_inflate += bool(surplus)
        return np.frombuffer(data[: len(data) - surplus], dtype="<u4")
