# SPDX-License-Identifier: Apache-2.0
"""What a virtio device is to a transport, and what a transport is to a device.

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

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.virtqueue import ChainBatch, Virtqueue

__all__ = ("DeviceQueue", "Transport", "VirtioDevice")

log = logging.getLogger(__name__)

BATCHES_PER_KICK = 16
"""Rings' worth of buffers handled before the loop looks at anything else: the guest decides how
much it makes available, but not how long the other queues and the control socket wait."""

SECONDS_PER_KICK = 0.0005
"""The same as time: no further batch is begun after this, a twentieth of which is what it costs to
come back."""


class DeviceQueue:
    """A started virtqueue as the device sees it: take, give, and the notification is seen to."""

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
        """The last turn ended with something left, so another one follows by itself."""
        self._notify = notify
        self._on_broken = on_broken

    def take(self, limit: int | None = None) -> ChainBatch | None:
        """The next batch, or None when there is nothing to take (or the queue is broken)."""
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
        except MemoryFault as error:  # a ring reached by messages, and nobody answers
            self.fail(error)
            return
        if wanted:
            self.notified += 1
            self._notify()

    def fail(self, error: PeerError) -> None:
        """Stop this queue for good (until the driver resets it): one line in the log, one event."""
        if self.broken is None:
            # A fresh one: the frames in the traceback of *error* would keep guest memory mapped.
            self.broken = broken = QueueError(error.rule, error.detail)
            log.error("queue %d stopped: %s", self.index, broken)
            self._on_broken(self, broken)


def _nothing(count: int) -> NDArray[np.uint32]:
    """Lengths of buffers into which nothing was written: a balloon's only ones, so ready-made."""
    return _ZEROES[:count] if count <= _ZEROES.size else np.zeros(count, np.uint32)


_ZEROES = np.zeros(32768, np.uint32)
_ZEROES.flags.writeable = False


class Transport(Protocol):
    """What a device may ask of whatever carries it."""

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as it is now."""

    @property
    def features(self) -> int:
        """The negotiated 64-bit feature word."""

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        """The rings that the driver has set up and that are started and enabled, by index."""

    def config_changed(self) -> None:
        """Send the guest a configuration change notification."""


class VirtioDevice(ABC):
    """A virtio device without its transport.

    Life: ``attach`` (a transport is there) → ``start`` (driver ready, queues may be used; called
    again whenever the set of started queues changes) → ``process`` for each kick → ``stop`` →
    ``reset`` → … → ``detach``.  All calls come from one thread.
    """

    device_id: int
    """Virtio device ID (virtio: *Device Types*)."""
    num_queues: int
    """How many virtqueues the device can have."""
    queue_size_max: int = 1024
    pci_class: int = 0xFF0000
    """PCI class code, 24 bits, for transports that show one."""

    @property
    @abstractmethod
    def device_features(self) -> int:
        """Device-specific feature bits offered (ring and transport bits are the transport's)."""

    @abstractmethod
    def read_config(self) -> bytes:
        """The whole device configuration space, little-endian, as the driver sees it now."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote *data* at *offset*; read-only fields are left as they are."""

    transport: Transport | None = None
    """What carries the device now; None while nothing does."""

    def attach(self, transport: Transport) -> None:
        """A transport now carries the device."""
        self.transport = transport

    def start(self) -> None:
        """The driver is ready: features are settled and ``transport.queues`` are usable."""

    @abstractmethod
    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        """Serve a batch: give every buffer of it back now, or hold it and give it back later."""

    def process(self, queue: DeviceQueue) -> bool:
        """Handle what is available on *queue*, a bounded amount; True when more is left.

        The driver is asked not to kick while its buffers are being taken anyway.
        """
        queue.kicked += not queue.unfinished  # going on is no answer to another kick
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
        """After ``start``: queues that were left alone so far and can be served from now on."""
        return ()

    def stop(self) -> None:
        """The queues are about to go away: give back every buffer that is still held."""

    def reset(self) -> None:
        """Device reset: as after power-on, apart from what the operator has set."""

    def restart(self) -> None:
        """A reset that the transport learns of only when the next driver starts the device.

        What that driver has written to the configuration space since :meth:`stop` is its own.
        """
        self.reset()

    def memory_changed(self) -> None:
        """The guest memory table is another one than before."""

    def detach(self) -> None:
        """The transport has gone (front-end disconnected)."""
        self.transport = None

    def save(self) -> bytes:
        """Device state for migration (empty: stateless)."""
        return b""

    def load(self, state: bytes) -> None:
        """Take over device state; raises :class:`~vballoon.errors.ProtocolError` if malformed."""
