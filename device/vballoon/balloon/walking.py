# SPDX-License-Identifier: Apache-2.0
"""The walk queue: free page ranges from the guest's own free lists, recorded and never discarded.

The buffers are declared in ``vballoon_spec.walk.formats``; what device and driver must do is in
``spec/vballoon_spec/walk/walk-queue.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.balloon.memmap import MemmapCollector
from vballoon.memory import PAGE_SHIFT
from vballoon.memory.records import reachable, read_records
from vballoon.skipmap import Provenance
from vballoon_spec.walk.formats import (
    BUFFER_MAX,
    WalkBegin,
    WalkEnd,
    WalkEndFlag,
    WalkHeader,
    WalkRange,
    WalkType,
    buffer_size,
)
from virtio_formats.wire import WireError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from vballoon.balloon.commands import CommandRounds
    from vballoon.balloon.counters import Counters
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("WalkQueue",)


MANY = 512
"""Ranges in a buffer from which it is recorded at once, while it is in the cache; smaller ones
wait for the end of their batch."""


TOGETHER = 4
"""Buffers from which it pays to look at all headers at once."""
TRIES = 4
"""How often in a batch; so a guest that makes every second buffer odd gains nothing by it."""


def _headers(batch: ChainBatch) -> NDArray[Any] | None:
    """Return a copy of all headers, or None unless every buffer is one readable, mapped piece."""
    if batch.addr.size != len(batch) or batch.writable.any():
        return None
    size = np.maximum(batch.len, WalkHeader.SIZE).astype(np.uint64)
    if not reachable(batch.memory, batch.addr, size).all():
        return None
    rows = read_records(batch.memory, batch.addr, np.ones(len(batch), np.intp))
    return rows.view(WalkHeader.dtype()).reshape(-1)


def _header(data: bytes) -> WalkHeader:
    """Return the header of a buffer, in a fifth of the time of its parser."""
    if len(data) < WalkHeader.SIZE:
        raise WireError(f"walk buffer of {len(data)} bytes")
    kind, flags, round_, seq, num = np.frombuffer(data, WalkHeader.dtype(), 1).item()
    return WalkHeader(type=kind, flags=flags, round=round_, seq=seq, num=num)


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class WalkQueue:
    """Serves walk_vq."""

    def __init__(self, counters: Counters, rounds: CommandRounds) -> None:
        self.rounds = rounds
        self.memmap = MemmapCollector()
        self.begin: WalkBegin | None = None
        """What the driver said at the beginning of the latest round, and at its end."""
        self.end: WalkEnd | None = None
        self._counters = counters
        self._seq = 0
        self._ranges = self._pages = self._buffers = 0
        self._pending: list[NDArray[Any]] = []

    def handle(self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap) -> None:
        """Take every buffer of the batch in order, then give all back."""
        heads = _headers(batch) if len(batch) >= TOGETHER else None
        done, tries = 0, TRIES
        while done < len(batch):
            if heads is not None and tries and done + TOGETHER <= len(batch):
                done, tries = done + self._together(batch, done, heads, skipmap), tries - 1
            if done < len(batch):
                self._alone(batch, done, skipmap)
                done += 1
        self._flush(skipmap)
        queue.give(batch.ids)

    def _together(
        self, batch: ChainBatch, first: int, heads: NDArray[Any], skipmap: SkipMap
    ) -> int:
        """Record the ranges of the buffers from *first* on that are plainly due; how many were.

        They are read where they are.  Whatever is odd about a buffer, it is left.
        """
        walk = self.rounds.round
        if not self.rounds.running or walk is None or self.begin is None:
            return 0
        self._flush(skipmap)
        head = heads[first:]
        counts = head["num"].astype(np.int64)
        due = (head["type"] == WalkType.RANGES) & (head["round"] == walk.id) & (counts > 0)
        due &= head["seq"] == self._seq + np.arange(head.size)
        due &= batch.len[first:] == WalkHeader.SIZE + WalkRange.SIZE * counts
        due &= batch.len[first:] <= BUFFER_MAX
        end = head.size if due.all() else int(np.argmin(due))
        addr = batch.addr[first : first + end] + np.uint64(WalkHeader.SIZE)
        done, pages, bad = skipmap.set_guest_records(
            Provenance.WALKED, batch.memory, addr, counts[:end], self._least
        )
        if not done:
            return 0
        self._seq += done
        self._buffers += done
        self._count(int(counts[:done].sum()), pages, bad)
        return done

    def _alone(self, batch: ChainBatch, i: int, skipmap: SkipMap) -> None:
        data = batch.readable(i, BUFFER_MAX + 1)
        try:
            self._buffer(data, skipmap)
        except WireError as error:
            self._bad(str(error))

    def reset(self) -> None:
        """Drop the round and the layout, which belong to the previous driver."""
        self.forget_round()
        self.memmap.reset()

    def forget_round(self) -> None:
        """Forget what belongs to one round."""
        self.begin = self.end = None
        self._pending = []

    def _buffer(self, data: bytes, skipmap: SkipMap) -> None:
        header = _header(data)
        if len(data) != buffer_size(header):
            raise WireError(f"walk buffer of {len(data)} bytes, its header says otherwise")
        match header.type:
            case WalkType.BEGIN:
                self._begin(header, data)
            case WalkType.RANGES:
                self._take_ranges(header, data)
                if header.num >= MANY:
                    self._flush(skipmap)
            case WalkType.END:
                self._flush(skipmap)
                self._finish(header, data)
            case WalkType.MEMMAP:
                if not self.memmap.add(header, data[WalkHeader.SIZE :]):
                    self._counters.bad_walk += 1

    def _begin(self, header: WalkHeader, data: bytes) -> None:
        if self.rounds.running or not self.rounds.echoed(header.round):
            self._bad("a BEGIN that belongs to no round just asked for")
            return
        self.begin, self.end = WalkBegin.parse(data[WalkHeader.SIZE :]), None
        self._seq = self._ranges = self._pages = self._buffers = 0
        self._in_sequence(header, 0)

    def _take_ranges(self, header: WalkHeader, data: bytes) -> None:
        if not self._current(header):
            return
        self._in_sequence(header, self._seq)
        self._buffers += 1
        self._pending.append(np.frombuffer(data, WalkRange.dtype(), offset=WalkHeader.SIZE))

    def _flush(self, skipmap: SkipMap) -> None:
        """Check and set what has come in."""
        if not self._pending:
            return
        records, self._pending = _joined(self._pending), []
        if not self.rounds.running or self.rounds.round is None or self.begin is None:
            return
        pages, bad = skipmap.set_records(Provenance.WALKED, records, self._least)
        self._count(records.size, pages, bad)

    @property
    def _least(self) -> int:
        """Pages of the smallest block that was asked for."""
        assert self.begin is not None  # ranges are recorded after a BEGIN only
        return 1 << min(self.begin.min_order + max(self.begin.page_shift - PAGE_SHIFT, 0), 30)

    def _count(self, records: int, pages: int, bad: int) -> None:
        """Account for *records* ranges, of which *bad* were left out."""
        assert self.rounds.round is not None  # as above
        self._ranges += records
        self._pages += pages
        self._counters.walked_ranges += records - bad
        self._counters.walked_pages += pages
        self._counters.bad_walk += bad
        self.rounds.round.record(records=records - bad, pages=pages, bad=bad)

    def _finish(self, header: WalkHeader, data: bytes) -> None:
        if not self._current(header):
            return
        self._in_sequence(header, self._seq)
        self.end = end = WalkEnd.parse(data[WalkHeader.SIZE :])
        walk = self.rounds.round
        assert walk is not None  # a running round is a round
        if end.result or header.flags & WalkEndFlag.CUT:  # reserved flags are ignored [WALK-D5]
            walk.spoil(f"the walk stopped early (result {end.result}, flags {header.flags:#x})")
        if (end.ranges, end.pages, end.buffers) != (self._ranges, self._pages, self._buffers):
            walk.spoil("the driver's totals are not what arrived")
        self.rounds.driver_stopped()

    def _current(self, header: WalkHeader) -> bool:
        """Whether the buffer belongs to the running round; another id's are ignored."""
        walk = self.rounds.round
        if self.rounds.running and walk is not None and header.round == walk.id:
            return True
        self._counters.bad_walk += 1
        return False

    def _in_sequence(self, header: WalkHeader, due: int) -> None:
        if header.seq != due and self.rounds.round is not None:
            self.rounds.round.spoil(f"buffer {header.seq} where {due} was due")
        self._seq = header.seq + 1

    def _bad(self, why: str) -> None:
        self._counters.bad_walk += 1
        if self.rounds.running and self.rounds.round is not None:
            self.rounds.round.spoil(why)
