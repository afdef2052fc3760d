# SPDX-License-Identifier: Apache-2.0
"""The common part of split and packed rings: outstanding buffers, taking and giving.

A format adds how buffers are found, how used ones are written, and how notifications are requested.
An engine adds how many buffers one step handles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import PeerError, QueueError, UsageError
from vballoon.memory import fence
from vballoon.virtqueue import rules
from vballoon.virtqueue.base import ChainBatch, RingState, Virtqueue, empty_batch
from vballoon.virtqueue.chain import Chain, batch_of, joined
from vballoon.virtqueue.circular import load_run, store_run
from vballoon.virtqueue.inflight import InflightLog, NullInflight, Resubmit
from virtio_formats.virtio import features as f

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory

__all__ = ("BATCH_DESCRIPTORS", "Ring")

BATCH_DESCRIPTORS = 1 << 16
"""Number of descriptors after which a batch ends.  Indirect tables let a guest attach as many
descriptors as the queue size to every head; this bounds the memory and the time of one call."""

_IDS = 1 << 16  # buffer ids of a packed ring are any 16-bit numbers

SCALAR_DESCRIPTORS = 4096
"""The same limit for chains that are walked one descriptor at a time (about 3 µs each)."""


class Ring(Virtqueue):
    """A virtqueue of either format.

    ``_slots[id]`` (uint16) is the number of ring descriptors of an outstanding buffer, and 0 for
    one that is not outstanding.  ``_held`` is their sum, which cannot exceed the queue size.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        features: int,
        *,
        inflight: InflightLog | None,
        resubmit: Resubmit | None,
    ) -> None:
        self.size = size
        self._memory = memory
        self._empty = empty_batch(memory)
        self._event_idx = f.has(features, f.VIRTIO_F_EVENT_IDX)
        self._indirect = f.has(features, f.VIRTIO_F_INDIRECT_DESC)
        self._in_order = f.has(features, f.VIRTIO_F_IN_ORDER)
        self._inflight = inflight or NullInflight()
        self._slots = np.zeros(size, np.uint16)
        self._outstanding = self._held = 0
        self._order = np.zeros(
            size, np.uint16
        )  # ids in the order of taking, circular, for in-order rings
        self._oldest = 0
        self._kicks = True
        self._resubmit: deque[Any] = deque(self._earlier(resubmit) if resubmit else ())
        # An earlier back-end may have died before it notified of its last used buffers.
        self._notify_anyway = resubmit is not None

    @property
    def outstanding(self) -> int:
        """Implement :attr:`Virtqueue.outstanding`."""
        return self._outstanding

    # taking

    @property
    def memory_lost(self) -> bool:
        """See :class:`Virtqueue`."""
        return self._memory.lost

    def take(self, limit: int | None = None) -> ChainBatch:
        """Implement :meth:`Virtqueue.take`."""
        limit = self.size if limit is None else min(limit, self.size)
        if limit <= 0:
            return self._empty
        if self._resubmit:
            return self._take_again(limit)
        batch = self._take_new(limit)
        if not len(batch) and self._kicks and self._event_idx and self.enable_kicks():
            batch = self._take_new(limit)
        return batch

    def _take_new(self, limit: int, batch: ChainBatch | None = None) -> ChainBatch:
        """Return a batch, until no buffer is left or the first malformed chain is reached.

        *batch* is the part taken before.
        """
        batch = batch or self._empty
        while len(batch) < limit and batch.addr.size < BATCH_DESCRIPTORS:
            try:
                part = self._take_part(limit - len(batch))
            except QueueError:
                if not len(batch):
                    raise
                break
            if not len(part):
                break
            batch = joined(batch, part)
        return batch

    def _take_part(self, limit: int) -> ChainBatch:
        """Take some buffers with the scalar engine; return none only if none is available."""
        return self._take_walking(limit)

    def _take_walking(self, limit: int) -> ChainBatch:
        chains = self._gather(self._walk_available(limit))
        if not chains:
            return self._empty
        batch = batch_of(self._memory, chains)
        slots = np.array([c.slots for c in chains], np.uint16)
        self._consume(len(chains), int(slots.sum()))
        self._inflight.on_take(batch.ids, slots, self._raw(chains))
        return self._book(batch, slots)

    def _take_again(self, limit: int) -> ChainBatch:
        """Return the buffers that were in flight before a crash, ahead of new ones."""
        chains = self._gather(self._walk_again(entry) for entry in list(self._resubmit)[:limit])
        for _ in chains:
            self._resubmit.popleft()
        return self._book(
            batch_of(self._memory, chains), np.array([c.slots for c in chains], np.uint16)
        )

    def _gather(self, chains: Iterable[Chain]) -> list[Chain]:
        """Return *chains* up to the first bad one; raise its error if it is the first.

        A chain must not reuse descriptors of outstanding buffers or of earlier chains.
        """
        good: list[Chain] = []
        held, ids, descriptors = self._held, set[int](), 0
        found = iter(chains)
        while descriptors < SCALAR_DESCRIPTORS:
            try:
                chain = next(found, None)
                if chain is None:
                    break
                if chain.id in ids:
                    raise QueueError(rules.BUFFER_REUSED, f"{chain.id}")
                if held + chain.slots > self.size:
                    raise QueueError(rules.RING_OVERRUN, f"{held} and {chain.slots} of {self.size}")
            except PeerError as error:
                if not good:
                    raise QueueError(error.rule, error.detail) from None
                break
            good.append(chain)
            ids.add(chain.id)
            held, descriptors = held + chain.slots, descriptors + len(chain.addr)
        return good

    def _book(self, batch: ChainBatch, slots: NDArray[np.uint16]) -> ChainBatch:
        """Record the buffers as outstanding."""
        if len(batch):
            self._admit(int(batch.ids.max()))
        self._slots[batch.ids] = slots
        return self._count(batch, int(slots.sum()))

    def _count(self, batch: ChainBatch, slots: int) -> ChainBatch:
        """Count the buffers, which occupy *slots* descriptors of the ring, as outstanding."""
        if self._in_order:
            store_run(self._order, (self._oldest + self._outstanding) % self.size, batch.ids)
        self._outstanding += len(batch)
        self._held += slots
        return batch

    def _is_busy(self, ident: int) -> bool:
        return ident < self._slots.size and bool(self._slots[ident])

    def _admit(self, ident: int) -> None:
        """Enlarge the table for buffer ids above the queue size, which packed rings may use."""
        if ident >= self._slots.size:
            self._slots = np.concatenate((self._slots, np.zeros(_IDS - self.size, np.uint16)))

    @abstractmethod
    def _walk_available(self, limit: int) -> Iterable[Chain]:
        """Yield at most *limit* available chains.  Raise QueueError at a malformed one."""

    @abstractmethod
    def _consume(self, buffers: int, slots: int) -> None:
        """Advance the available index."""

    def _raw(self, chains: list[Chain]) -> NDArray[Any] | None:
        """Return the ring descriptors of *chains*, for the in-flight record of a packed ring."""
        return None

    # buffers of an earlier back-end

    @abstractmethod
    def _earlier(self, resubmit: Resubmit) -> Iterable[Any]:
        """Return the argument of :meth:`_walk_again` for each buffer."""

    @abstractmethod
    def _walk_again(self, entry: Any) -> Chain:
        """Return the chain of a buffer that was in flight before."""

    # giving

    def give(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        """Implement :meth:`Virtqueue.give`."""
        slots = self._check_given(ids, written)
        if not ids.size:
            return
        publish = self._write_used(ids, written, slots)
        self._inflight.before_give(ids)
        # Elements first, then the index or the first flag.
        fence.release()
        publish()
        self._outstanding -= ids.size
        self._held -= self._freed(slots)
        if not isinstance(self._inflight, NullInflight):
            self._inflight.after_give(ids, self.state())

    def _freed(self, slots: NDArray[np.uint16]) -> int:
        """Return the sum of the latest result of :meth:`_check_given`."""
        return int(slots.sum())

    def _check_given(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32]
    ) -> NDArray[np.uint16]:
        """Mark the buffers as not outstanding and return their slots.  Raise UsageError."""
        if ids.shape != written.shape:
            raise UsageError(f"{ids.size} buffers but {written.size} lengths")
        before, at = self._slots.copy(), ids.astype(np.intp)
        try:
            slots = before.take(at)
            self._slots[at] = 0
            # The count falls by one for each id, unless an id was not outstanding or occurs twice.
            if np.count_nonzero(self._slots) != self._outstanding - ids.size:
                raise UsageError("a buffer that is not outstanding is given back")
            self._check_order(ids)
        except IndexError:
            raise UsageError(
                "a buffer with an id that the queue cannot have is given back"
            ) from None
        except UsageError:
            self._slots[:] = before
            raise
        return slots

    def _check_order(self, ids: NDArray[np.uint16]) -> None:
        if not self._in_order:
            return
        if not np.array_equal(load_run(self._order, self._oldest, ids.size), ids):
            raise UsageError("VIRTIO_F_IN_ORDER: buffers must be given back in the order of taking")
        self._oldest = (self._oldest + ids.size) % self.size

    @abstractmethod
    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Any:
        """Write all but the publishing store and return the call that publishes."""

    @abstractmethod
    def state(self) -> RingState:
        """Implement :meth:`Virtqueue.state`."""
