# SPDX-License-Identifier: Apache-2.0
"""The walk queue: free page ranges from the guest's own free lists, recorded and never discarded.

The buffers are declared in ``vballoon_spec.walk.formats``; what device and driver must do is in
``spec/vballoon_spec/walk/walk-queue.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.balloon.memmap import MemmapCollector
from vballoon.skipmap import Provenance
from vballoon_spec.virtio.balloon import PFN_SHIFT
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
from vballoon_spec.wire import WireError

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


def _header(data: bytes) -> WalkHeader:
    """The header of a buffer; a fifth of the time that its parser takes."""
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
        for i in range(len(batch)):
            data = batch.readable(i, BUFFER_MAX + 1)
            try:
                self._buffer(data, skipmap)
            except WireError as error:
                self._bad(str(error))
        self._flush(skipmap)
        queue.give(batch.ids)

    def reset(self) -> None:
        """Another driver, another boot: round and layout are forgotten."""
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
        least = 1 << min(self.begin.min_order + max(self.begin.page_shift - PFN_SHIFT, 0), 30)
        pages, bad = skipmap.set_records(Provenance.WALKED, records, least)
        self._ranges += records.size
        self._pages += pages
        self._counters.walked_ranges += records.size - bad
        self._counters.walked_pages += pages
        self._counters.bad_walk += bad
        self.rounds.round.record(records=records.size - bad, pages=pages, bad=bad)

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
