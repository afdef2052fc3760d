# SPDX-License-Identifier: Apache-2.0
"""The virtqueues behind the registers: put up, taken down, and where they stood meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vballoon.errors import MemoryFault, PeerError, QueueError
from vballoon.virtio import DeviceQueue
from vballoon.virtqueue import Engine, RingAddresses, RingState, make_virtqueue

if TYPE_CHECKING:
    from vballoon.memory import GuestMemory
    from vballoon.virtio_pci.registers import QueueRegisters

__all__ = ("Rings",)

log = logging.getLogger(__name__)

_ABSENT = frozenset({"memory-address", "ring-address"})
"""Rules that a ring breaks whose memory is not there.  Clients change a region by unmapping it and
mapping it again, so a ring that has run already waits for that."""

_COUNTERS = ("taken", "given", "notified", "kicked")


class Rings:
    """The queues that are up (``queues``, by index), and the state of those that were.

    *notify(index)* sends a used buffer notification, *on_broken(index, error)* is told of a queue
    that stopped.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        notify: Callable[[int], None],
        on_broken: Callable[[int, QueueError], None],
    ) -> None:
        self.queues: dict[int, DeviceQueue] = {}
        self.broken: dict[int, QueueError] = {}
        self.states: dict[int, RingState] = {}
        """Where the queues stand that were up and are not."""
        self._counters: dict[int, tuple[int, ...]] = {}
        self._engine = engine
        self._notify = notify
        self._on_broken = on_broken

    def put_up(
        self, index: int, registers: QueueRegisters, memory: GuestMemory, features: int
    ) -> None:
        """Start queue *index*, where it stood if it was up before; or it is broken at once."""
        if index in self.queues or index in self.broken:
            return
        at = RingAddresses(registers.desc, registers.driver, registers.device)
        try:
            ring = make_virtqueue(
                memory,
                registers.size,
                at,
                features,
                self.states.get(index),
                engine=self._engine,
                dirty_ring=at.device,
            )
        except PeerError as error:
            if index in self.states and error.rule in _ABSENT:
                log.info("queue %d waits for its memory: %s", index, error)
                return
            self._fail(index, QueueError(error.rule, error.detail))
            return
        queue = DeviceQueue(
            index,
            ring,
            notify=lambda: self._notify(index),
            on_broken=lambda queue, error: self._fail(queue.index, error),
        )
        for name, value in zip(_COUNTERS, self._counters.get(index, ()), strict=False):
            setattr(queue, name, value)
        self.queues[index] = queue

    def _fail(self, index: int, error: QueueError) -> None:
        self.broken[index] = error
        self._on_broken(index, error)

    def give_up(self, registers: Sequence[QueueRegisters], memory: GuestMemory) -> None:
        """A reset is under way: rings that only messages reach get nothing back any more."""
        for index, queue in self.queues.items():
            try:
                memory.window(registers[index].device, 4)
            except MemoryFault:
                queue.broken = queue.broken or QueueError("device-reset")

    def take_down(self) -> None:
        """Stop every queue, and remember where it stands.  The device is stopped already."""
        for index, queue in self.queues.items():
            self.states[index] = queue.ring.state()
            self._counters[index] = tuple(getattr(queue, name) for name in _COUNTERS)
        self.queues = {}

    def forget(self, index: int) -> None:
        """Queue *index* starts from nothing next time."""
        self.queues = {i: queue for i, queue in self.queues.items() if i != index}
        for record in (self.broken, self.states, self._counters):
            record.pop(index, None)

    def reset(self) -> None:
        """Forget all of them."""
        self.queues = {}
        self.broken.clear()
        self.states.clear()
        self._counters.clear()
