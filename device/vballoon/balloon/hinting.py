# SPDX-License-Identifier: Apache-2.0
"""Free page hinting: a queue that mixes command ids (readable) and free pages (writable).

Label: *Memory Balloon Device / Device Operation / Free Page Hinting*.  Hinted pages are recorded,
never discarded, because the driver may use a page again before its buffer is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.pages import whole_pages
from vballoon.skipmap import Provenance
from virtio_formats.virtio.balloon import CMD_ID_STOP, BalloonCmdId

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.balloon.commands import CommandRounds
    from vballoon.balloon.counters import Counters
    from vballoon.skipmap import SkipMap
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("HintQueue",)


class HintQueue:
    """Serves free_page_vq."""

    def __init__(self, counters: Counters, rounds: CommandRounds) -> None:
        self.rounds = rounds
        self._counters = counters
        self._taking = False
        """Whether the latest command id was the current one: the next pages belong to the round."""

    def handle(self, queue: DeviceQueue, batch: ChainBatch, skipmap: SkipMap) -> None:
        """Follow the command ids, record the pages of the current round, and return all buffers."""
        if np.count_nonzero(batch.writable) == batch.writable.size:  # as usual: no command id
            self._record(batch.addr, batch.len, skipmap)
        else:
            done = 0
            for at in np.flatnonzero(batch.readable_size()).tolist():
                self._pages(batch, done, at, skipmap)
                self._command(batch, at)
                done = at  # pages after the id in the same buffer belong to the new id
            self._pages(batch, done, len(batch), skipmap)
        queue.give(batch.ids)

    def reset(self) -> None:
        """Forget the latest command id."""
        self._taking = False

    def _command(self, batch: ChainBatch, i: int) -> None:
        data = batch.readable(i, BalloonCmdId.SIZE + 1)
        if len(data) != BalloonCmdId.SIZE:
            self._counters.bad_hint += 1
            self._taking = False
            if self.rounds.running and self.rounds.round is not None:
                self.rounds.round.spoil("a command buffer that is not 4 bytes long")
            return
        cmd_id = BalloonCmdId.parse(data).cmd_id
        self._taking = cmd_id != CMD_ID_STOP and self.rounds.echoed(cmd_id)
        if cmd_id == CMD_ID_STOP:
            self.rounds.driver_stopped()

    def _pages(self, batch: ChainBatch, first: int, last: int, skipmap: SkipMap) -> None:
        """Record the writable descriptors of buffers *first* up to *last*."""
        part = slice(int(batch.first[first]), int(batch.first[last]))
        which = batch.writable[part]
        self._record(batch.addr[part][which], batch.len[part][which], skipmap)

    def _record(
        self, addr: NDArray[np.uint64], length: NDArray[np.uint32], skipmap: SkipMap
    ) -> None:
        """Record the pages in ``[addr, addr + length)`` in a running round, else count as stale."""
        if not addr.size:
            return
        if self._taking and self.rounds.running and self.rounds.round is not None:
            pages, odd = skipmap.set_bytes(Provenance.HINTED, addr, length)
            self.rounds.round.record(records=addr.size, pages=pages)
            self._counters.hinted_pages += pages
        else:
            start, end, odd = whole_pages(addr, length)
            self._counters.hints_stale_pages += int((end - start).sum())
        self._counters.bad_hint += odd
