# SPDX-License-Identifier: Apache-2.0
"""The interfaces of a virtio device for a transport, and of a transport for a device.

A device knows features, configuration space and queues; it knows no socket, no eventfd and no
message.  A transport (vhost-user, virtio-pci over vfio-user, a test) drives it through
:class:`VirtioDevice` and serves it through :class:`Transport`.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vballoon.errors import MemoryFault, PeerError, QueueError
from vballoon.virtqueue.rules import MEMORY_LOST

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.virtqueue import ChainBatch, Virtqueue

__all__ = ("DeviceQueue", "Transport", "VirtioDevice")

log = logging.getLogger(__name__)

BATCHES_PER_KICK = 16
"""Maximum number of batches per kick.  The guest decides how many buffers it makes available; this
bounds how long the other queues and the control socket wait."""

SECONDS_PER_KICK = 0.0005
"""Time budget per kick in seconds.  Re-entering the loop costs about 5 % of it."""


class DeviceQueue:
    """A started virtqueue for the device: it takes and gives buffers, and notifies the driver."""

    def __init__(
        self,
        index: int,
        ring: Virtqueue,
        *,
        notify: Callable[[], None],
        on_broken: Callable[[DeviceQueue, QueueError], None],
    ) -> None:
        self.index = index
        self.ring = ring
        self.broken: QueueError | None = None
        self.taken = self.given = self.notified = self.kicked = 0
        """Counters, in buffers and notifications, since the ring was started."""
        self.unfinished = False
        """Buffers were left at the end of the last turn, so another turn is scheduled."""
        self._notify = notify
        self._on_broken = on_broken

    def take(self, limit: int | None = None) -> ChainBatch | None:
        """Return the next batch, or None if no buffer is available or the queue is broken."""
        if self.broken is not None:
            return None
        try:
            batch = self.ring.take(limit)
        except QueueError as error:
            self.fail(error)
            return None
        self.taken += len(batch)
        return batch if len(batch) else None

    def give(self, ids: NDArray[np.uint16], written: NDArray[np.uint32] | int = 0) -> None:
        """Return buffers to the driver and notify it if it asked for that."""
        if isinstance(written, int):
            lengths = np.full(ids.size, written, np.uint32) if written else _nothing(ids.size)
        else:
            lengths = np.asarray(written, dtype=np.uint32)
        try:
            self.ring.give(ids, lengths)
            self.given += int(ids.size)
            wanted = self.ring.should_notify()
        except MemoryFault as error:  # a ring reached by messages that get no answer
            self.fail(error)
            return
        if wanted:
            self.notified += 1
            self._notify()

    def fail(self, error: PeerError) -> None:
        """Stop this queue until the driver resets it; log one line and send one event."""
        if self.broken is None:
            if self.ring.memory_lost:  # whatever was wrong was read from zeroes
                error = QueueError(MEMORY_LOST, "the front-end has taken guest memory away")
            # A new error: the frames in the traceback of *error* would keep guest memory mapped.
            self.broken = broken = QueueError(error.rule, error.detail)
            log.error("queue %d stopped: %s", self.index, broken)
            self._on_broken(self, broken)


def _nothing(count: int) -> NDArray[np.uint32]:
    """Return *count* zero lengths from a shared array: a balloon writes to no buffer."""
    return _ZEROES[:count] if count <= _ZEROES.size else np.zeros(count, np.uint32)


_ZEROES = np.zeros(32768, np.uint32)
_ZEROES.flags.writeable = False


class Transport(Protocol):
    """The interface of a transport for the device."""

    @property
    def memory(self) -> GuestMemory:
        """The current guest memory."""

    @property
    def features(self) -> int:
        """The negotiated 64-bit feature word."""

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        """The started and enabled rings that the driver has set up, by index."""

    def config_changed(self) -> None:
        """Send the guest a configuration change notification."""


class VirtioDevice(ABC):
    """A virtio device without its transport.

    The calls in the life of a device are: ``attach`` (a transport is connected), ``start`` (the
    driver is ready and queues may be used; again whenever the set of started queues changes),
    ``process`` for each kick, ``stop``, ``reset`` (these may repeat), ``detach``.  All calls come
    from one thread.
    """

    device_id: int
    """Virtio device ID (virtio: *Device Types*)."""
    num_queues: int
    """Maximum number of virtqueues of the device."""
    queue_size_max: int = 1024
    pci_class: int = 0xFF0000
    """PCI class code of 24 bits, for transports that have one."""

    @property
    @abstractmethod
    def device_features(self) -> int:
        """Offered device-specific feature bits; the transport adds ring and transport bits."""

    @abstractmethod
    def read_config(self) -> bytes:
        """Return the whole device configuration space, little-endian."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Handle a driver's write of *data* at *offset*; ignore read-only fields."""

    transport: Transport | None = None
    """The current transport, or None."""

    def attach(self, transport: Transport) -> None:
        """Connect the device to *transport*."""
        self.transport = transport

    def start(self) -> None:
        """Start after the driver is ready: features and ``transport.queues`` are valid."""

    @abstractmethod
    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        """Serve a batch: give every buffer back now, or hold it and give it back later."""

    def process(self, queue: DeviceQueue) -> bool:
        """Handle a bounded number of buffers of *queue*; return True if more may be left.

        Kicks are disabled meanwhile, because the buffers are taken in any case.
        """
        queue.kicked += not queue.unfinished  # continuing is not counted as another kick
        queue.unfinished = False
        try:
            queue.unfinished = self._drain(queue)
        except (QueueError, MemoryFault) as error:
            queue.fail(error)
        return queue.unfinished

    def _drain(self, queue: DeviceQueue) -> bool:
        queue.ring.disable_kicks()
        end = time.monotonic() + SECONDS_PER_KICK
        for _ in range(BATCHES_PER_KICK):
            batch = queue.take()
            if batch is not None:
                self.handle(queue, batch)
            elif queue.broken is not None or not queue.ring.enable_kicks():
                return False
            if time.monotonic() > end:
                break
        return queue.broken is None

    def overdue(self) -> Collection[int]:
        """Return queues that were not served before ``start`` and can be served now."""
        return ()

    def stop(self) -> None:
        """Give back every buffer that is still held, before the queues are stopped."""

    def reset(self) -> None:
        """Reset the device to its state after power-on, except for the operator's settings."""

    def restart(self) -> None:
        """Reset the device when the transport detects the reset only at the next driver's start.

        Keep what that driver has written to the configuration space since :meth:`stop`.
        """
        self.reset()

    def memory_changed(self) -> None:
        """Handle a new guest memory table."""

    def detach(self) -> None:
        """Disconnect the device from its transport."""
        self.transport = None

    def save(self) -> bytes:
        """Return the device state for migration; empty for a stateless device."""
        return b""

    def load(self, state: bytes) -> None:
        """Load a device state.  Raise :class:`~vballoon.errors.ProtocolError` if malformed."""
