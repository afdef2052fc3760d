# SPDX-License-Identifier: Apache-2.0
"""Inflate and deflate: arrays of 32-bit page numbers.

*Memory Balloon Device / Device Operation*.  Inflated pages are discarded before the buffer is
given back, in merged ranges; deflated ones leave the bitmap before it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.gather import gather_u32
from vballoon.memory.pages import coalesce
from vballoon.skipmap import Provenance
from vballoon_spec.virtio.balloon import PFN_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.balloon.counters import Counters
    from vballoon.memory import Discarder, GuestMemory
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("InflateQueues",)

PFNS_PER_BUFFER_MAX = 16384
"""Page numbers read of one buffer.  Linux sends 256; what a longer buffer holds beyond this is
ignored and counted, so that a buffer of 4 GiB costs the guest more than it costs the host."""

PFNS_AT_ONCE = 1 << 20
"""Page numbers handled in one go: bounds the memory that a full ring of full buffers takes."""

_SHIFT = np.uint64(PFN_SHIFT)


class InflateQueues:
    """Serves inflateq and deflateq."""

    def __init__(self, counters: Counters, discarder: Discarder) -> None:
        self._counters = counters
        self._discarder = discarder

    def inflate(
        self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap, *, tells: bool
    ) -> None:
        """Discard the pages, set their bits, give the buffers back.

        *tells*: the driver asks before it uses a page again (MUST_TELL_HOST negotiated), so that
        the parts of a huge page may add up.
        """
        for pfns in self._read(batch):
            start, end = self._ranges(batch.memory, pfns)
            self._counters.inflated_pages += int((end - start).sum())
            self._counters.discarded_bytes += self._discarder.discard(
                batch.memory, start << _SHIFT, end << _SHIFT, accumulate=tells
            )
            skipmap.set_ranges(Provenance.BALLOONED, start, end)
        queue.give(batch.ids)

    def deflate(self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap) -> None:
        """Clear the bits first: from the acknowledgement on, the pages may be the guest's."""
        for pfns in self._read(batch):
            start, end = self._ranges(batch.memory, pfns)
            self._counters.deflated_pages += int((end - start).sum())
            skipmap.clear_ranges(Provenance.BALLOONED, start, end)
            self._discarder.undo(batch.memory, start << _SHIFT, end << _SHIFT)
        queue.give(batch.ids)

    def _read(self, batch: ChainBatch) -> list[NDArray[np.uint32]]:
        """The page numbers of all buffers, in pieces of bounded size."""
        size = np.where(batch.writable, 0, batch.len).astype(np.int64)
        if (size & 3).any():
            return [self._read_odd(batch, i) for i in range(len(batch))]
        words = self._bounded(batch, size >> 2)
        read = np.flatnonzero(words)
        if not read.size:
            return []
        piece = (np.cumsum(words[read]) - 1) // PFNS_AT_ONCE
        cuts = np.flatnonzero(np.diff(piece)) + 1
        return [
            gather_u32(batch.memory, batch.addr[part], words[part]) for part in np.split(read, cuts)
        ]

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
        """A buffer with a page number across two descriptors, or with bytes to spare."""
        data = batch.readable(i, 4 * PFNS_PER_BUFFER_MAX)
        surplus = len(data) & 3
        self._counters.bad_inflate += bool(surplus)
        return np.frombuffer(data[: len(data) - surplus], dtype="<u4")

    def _ranges(
        self, memory: GuestMemory, pfns: NDArray[np.uint32]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Page numbers → merged half-open ranges in guest memory; the others are counted."""
        start = pfns.astype(np.uint64)  # widen first: a 32-bit shift by 12 would wrap
        inside = memory.contains(start << _SHIFT, np.full(start.size, 1 << PFN_SHIFT, np.uint64))
        if not inside.all():
            self._counters.bad_inflate += int((~inside).sum())
            start = start[inside]
        return coalesce(start, start + np.uint64(1))
