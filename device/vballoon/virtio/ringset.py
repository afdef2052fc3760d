# SPDX-License-Identifier: Apache-2.0
"""The rings of one device: which of them run, where the others stopped, and how one is served.

A transport says which rings the driver wants (:meth:`RingSet.settle`) and when one has work
(:meth:`RingSet.process`).  How a ring is built from what the driver wrote, and how a notification
reaches the driver, is the transport's part (:class:`RingOwner`).

A ring is *bound* while a virtqueue exists for it, *running* while the device may use it, and
*parked* when its virtqueue was taken away and only its position is kept, because guest memory is
about to change or the machine stands still.  The device is stopped before a running ring is taken
away, so that it can still give back the buffers that it holds.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vballoon.errors import PeerError, ProtocolError, QueueError
from vballoon.native import guard
from vballoon.virtio.device import DeviceQueue
from vballoon.virtio.events import TransportEvents
from vballoon.virtio.status import QueueStatus
from vballoon.virtqueue.rules import MEMORY_LOST
from virtio_formats.virtio.ring_state import DETAIL_SIZE, RULE_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from vballoon.virtio.device import VirtioDevice
    from vballoon.virtqueue import RingState, Virtqueue

__all__ = ("RingFault", "RingOwner", "RingRecord", "RingSet", "internal_fault")

log = logging.getLogger(__name__)

_ABSENT = frozenset({"memory-userspace", "memory-address", "ring-address"})
"""Rules that a ring breaks while its memory is not mapped.  Front-ends change a region by removing
it and adding it again, so a ring that has run before waits for the next memory table."""


@dataclass(frozen=True, slots=True)
class RingFault:
    """Why a ring was stopped: the rule that was broken, and how.

    Both are printable ASCII of bounded length, so that every fault fits into a packed record.
    """

    rule: str
    detail: str = ""

    @classmethod
    def of(cls, error: PeerError) -> RingFault:
        """Return the fault that *error* names, cut to what a record holds."""
        return cls(_printable(error.rule, RULE_SIZE), _printable(error.detail, DETAIL_SIZE))


def _printable(text: str, limit: int) -> str:
    """Return *text* as at most *limit* printable ASCII characters."""
    plain = text.encode("ascii", "backslashreplace").decode("ascii")
    return "".join(letter if letter.isprintable() else "?" for letter in plain)[:limit]


@dataclass(frozen=True, slots=True)
class RingRecord:
    """What is known of one ring apart from what the driver wrote about it."""

    position: RingState | None = None
    """The next buffer to take and the next used slot; None for a ring that has not run."""
    outstanding: int = 0
    """Buffers that the device has taken and not given back."""
    broken: RingFault | None = None
    taken: int = 0
    given: int = 0
    notified: int = 0
    kicked: int = 0


class RingOwner(Protocol):
    """The part of a transport that a :class:`RingSet` calls."""

    def build_ring(self, index: int, record: RingRecord) -> Virtqueue:
        """Return a virtqueue for ring *index* that continues where *record* says.

        Raise :class:`~vballoon.errors.PeerError` when the ring cannot be served.
        """

    def device_starts(self) -> None:
        """Prepare for the call of the device's ``start`` that follows."""

    def notify(self, index: int) -> None:
        """Send the driver a used buffer notification for ring *index*."""

    def ring_broken(self, index: int, error: QueueError) -> None:
        """Handle ring *index*, which has stopped until the driver resets it."""


class RingSet:
    """The rings of *device*, *count* of them, served on behalf of *owner*."""

    def __init__(
        self,
        device: VirtioDevice,
        owner: RingOwner,
        *,
        count: int | None = None,
        events: TransportEvents | None = None,
    ) -> None:
        self._device, self._owner = device, owner
        self.events = events or TransportEvents()
        self._count = device.num_queues if count is None else count
        self._bound: dict[int, DeviceQueue] = {}
        self._running: dict[int, DeviceQueue] = {}
        self._waiting: set[int] = set()  # their memory was absent in the current table
        self._interrupted: set[int] = set()  # bound in another process when it ended
        self._records = [RingRecord()] * self._count

    def __len__(self) -> int:
        """Return the number of rings that the device can have."""
        return self._count

    @property
    def running(self) -> Mapping[int, DeviceQueue]:
        """The rings that the device may use, by index."""
        return self._running

    @property
    def ran(self) -> frozenset[int]:
        """The rings whose position is in guest memory and not in their records.

        They are bound, or were bound in another process when it ended.
        """
        return frozenset(self._bound.keys() | self._interrupted)

    def queue(self, index: int) -> DeviceQueue | None:
        """Return the queue of ring *index* if it is bound, running or not."""
        return self._bound.get(index)

    def record(self, index: int) -> RingRecord:
        """Return what is known of ring *index* now, its counters included."""
        queue, record = self._bound.get(index), self._records[index]
        if queue is None:
            return record
        return replace(
            record,
            position=queue.ring.state(),
            outstanding=queue.ring.outstanding,
            taken=queue.taken,
            given=queue.given,
            notified=queue.notified,
            kicked=queue.kicked,
        )

    def status(self, index: int, *, size: int, started: bool, recovered: int = 0) -> QueueStatus:
        """Return the status of ring *index*.

        The transport knows its *size* in descriptors, and whether the driver has *started* it.
        """
        record = self.record(index)
        state = "disabled" if started else "stopped"
        if record.broken is not None:
            state = "broken"
        elif index in self._running:
            state = "running"
        return QueueStatus(
            index=index,
            state=state,
            size=size,
            broken=record.broken.rule if record.broken else None,
            outstanding=record.outstanding,
            taken=record.taken,
            given=record.given,
            kicked=record.kicked,
            notified=record.notified,
            recovered=recovered,
        )

    # -- which rings run ----------------------------------------------------------------------

    def settle(self, wanted: Iterable[int]) -> Collection[int]:
        """Make exactly the rings *wanted* run, except those that are broken or have no memory.

        Return the rings to serve now: the driver may have filled them long ago, and no further
        kick announces that.
        """
        faults = guard.faults()
        wanted = sorted(wanted)
        for index in wanted:
            self._bind(index)
        queues = {index: self._bound[index] for index in wanted if index in self._bound}
        if queues == self._running:  # queues compare by identity
            return ()
        new = [i for i, queue in queues.items() if self._running.get(i) is not queue]
        if self._running.keys() - queues.keys():
            self.pause()
        self._running = queues
        if not queues:
            return ()
        self._owner.device_starts()
        self._device.start()
        if guard.faults() != faults:
            self._memory_lost()
        return {*new, *self._device.overdue()}

    def _bind(self, index: int) -> None:
        record = self._records[index]
        if index in self._bound or index in self._waiting or record.broken is not None:
            return
        try:
            ring = self._owner.build_ring(index, record)
        except PeerError as error:
            ran = record.position is not None or index in self._interrupted
            if ran and error.rule in _ABSENT:
                self._waiting.add(index)
                log.info("queue %d: ring memory is not mapped yet: %s", index, error)
                return
            # A fresh error: the frames of a traceback would keep guest memory mapped.
            broken = QueueError(error.rule, error.detail)
            log.error("queue %d cannot be started: %s", index, broken)
            self._break(index, broken)
            return
        queue = DeviceQueue(
            index, ring, notify=partial(self._owner.notify, index), on_broken=self._on_broken
        )
        queue.taken, queue.given = record.taken, record.given
        queue.notified, queue.kicked = record.notified, record.kicked
        self._bound[index] = queue
        self._interrupted.discard(index)

    def pause(self) -> None:
        """Stop the device: it gives back the buffers that it holds, and no ring runs after that.

        The rings stay bound.  Whatever else than a :class:`~vballoon.errors.PeerError` the device
        raises is raised here, after the rings have been stopped.
        """
        if not self._running:
            return
        try:
            self._device.stop()
        except PeerError as error:
            log.info("while the device stops: %s", error)
        finally:
            self._running = {}

    def park(self) -> None:
        """Stop the device and unbind every ring, keeping where each stopped."""
        try:
            self.pause()
        finally:
            for index in self._bound:
                self._records[index] = self.record(index)
            self._bound = {}
            self._waiting.clear()

    def end(self, index: int) -> RingRecord:
        """End the life of ring *index*: return where it stopped, and forget it.

        The other rings are stopped too if it was running; settle them again.
        """
        if index in self._running:
            self.pause()
        record = self.record(index)
        self._bound.pop(index, None)
        self._records[index] = RingRecord()
        self._waiting.discard(index)
        self._interrupted.discard(index)
        return record

    def reset(self) -> None:
        """Stop the device and forget every ring."""
        try:
            self.park()
        finally:
            self._interrupted.clear()
            self._records = [RingRecord()] * self._count

    def state(self) -> tuple[RingRecord, ...]:
        """Return the record of every ring, for a process that continues where this one ends.

        Only a parked ring has a position in it.  That of a bound one changes with every buffer;
        a restarted process finds it in guest memory and in the in-flight record.
        """
        return tuple(
            replace(self.record(index), position=None) if index in self._bound else record
            for index, record in enumerate(self._records)
        )

    def restore(self, records: Sequence[RingRecord], ran: Iterable[int] = ()) -> None:
        """Continue from the *records* of another process; no ring runs until it is settled.

        *ran* is what :attr:`ran` was there.

        Raise :class:`~vballoon.errors.ProtocolError` ``ring-records``, with nothing changed, for
        another number of rings.
        """
        if len(records) != self._count:
            raise ProtocolError("ring-records", f"{len(records)} of {self._count} rings")
        self.reset()
        self._records = list(records)
        self._interrupted = set(ran)

    # -- serving ------------------------------------------------------------------------------

    def process(self, index: int) -> bool:
        """Serve a bounded amount of ring *index*; return whether more is left.

        An exception that the device raises stops that queue, and neither the others nor the
        transport.  A ring that does not run is left alone.
        """
        queue = self._running.get(index)
        if queue is None:
            return False
        faults, more = guard.faults(), False
        try:
            more = self._device.process(queue)
        except PeerError as error:
            queue.fail(error)
        except Exception as error:
            queue.fail(internal_fault(error))
        if guard.faults() != faults:
            self._memory_lost()
            return False
        return more

    def _memory_lost(self) -> None:
        """Stop every queue: memory that the front-end took away reads as zeroes from now on."""
        for queue in tuple(self._running.values()):
            queue.fail(QueueError(MEMORY_LOST, "an access to guest memory failed"))

    def _on_broken(self, queue: DeviceQueue, error: QueueError) -> None:
        self._break(queue.index, error)

    def _break(self, index: int, error: QueueError) -> None:
        self._records[index] = replace(self._records[index], broken=RingFault.of(error))
        self.events.queue_broken(index, error.rule, error.detail)
        self._owner.ring_broken(index, error)


def internal_fault(error: Exception) -> QueueError:
    """Return the one-line form of *error*, a fault of our own: what it is and where it was raised.

    The error itself is not kept, because the frames of its traceback hold guest memory.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return QueueError("internal", f"{type(error).__name__}: {error}{place}")
