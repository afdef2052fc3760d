# SPDX-License-Identifier: Apache-2.0
"""Bring a device up over one transport, and put requests through its rings.

The tests of rings are written against :class:`Rig` and run over vhost-user
(:mod:`.rig_vhost_user`) and vfio-user (:mod:`.rig_vfio_user`) alike.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from virtio_conformance.findings import Finding, not_applicable, preparing
from virtio_conformance.memory import GuestRam
from virtio_conformance.observe import EventFd, Process
from virtio_conformance.profiles import FILL, Exchange, Profile
from virtio_conformance.ring import DriverRing, Segment, Used, cut_up
from virtio_conformance.ring_packed import PackedRing
from virtio_conformance.ring_split import SplitRing
from virtio_conformance.target import Target
from virtio_formats.virtio import features as f

__all__ = ("Placed", "Rig")

RING_SIZE = 64
"""Descriptors of a ring if a test does not choose a size: far below what any back-end supports."""


@dataclass
class Placed:
    """A request in guest memory, with its segments and the id of its buffer."""

    exchange: Exchange
    segments: list[Segment]
    writable_at: int = 0
    id: int = -1


class Rig(ABC):
    """One device, one connection, and the driver side of its rings."""

    transport: str
    can_stop = False
    """Whether a single ring can be stopped and started again."""
    ring_region = 0
    """The region of memory that rings are made in."""
    frees = True
    """Whether a balloon is known to free inflated pages; the standard does not require it."""
    frees_reports = True
    """The same for reported ranges."""

    def __init__(self, target: Target, profile: Profile, *, packed: bool = False) -> None:
        self.target = target
        self.profile = profile
        self.packed = packed
        self.ram = GuestRam()
        self.rings: dict[int, DriverRing] = {}
        self.kicks: dict[int, EventFd] = {}
        self.calls: dict[int, EventFd] = {}
        self.notes: dict[str, Any] = {}
        self.features = 0
        try:
            with preparing():
                self.connect()
            if packed:
                self.need(f.VIRTIO_F_RING_PACKED, "RING_PACKED")
        except BaseException:  # no caller can close it; a server may wait for its disconnect
            self.close()
            raise

    # -- transport ---------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> None:
        """Open the connection and learn what is offered."""

    @property
    @abstractmethod
    def offered(self) -> int:
        """The virtio feature bits that the device offers, as a mask."""

    @abstractmethod
    def negotiate(self, features: int) -> None:
        """Negotiate features and share memory.  Raise a finding if either is refused."""

    @abstractmethod
    def start_ring(self, index: int, ring: DriverRing, *, base: int | None = None) -> None:
        """Program a ring and start it; *base* is where it starts, if not at 0."""

    @abstractmethod
    def driver_ok(self) -> None:
        """Report that the driver is ready, after all rings were started."""

    @abstractmethod
    def kick(self, index: int) -> None:
        """Notify the device, even if it does not want a notification."""

    @abstractmethod
    def usable(self) -> bool:
        """Return True if the connection answers, False if it was closed.  Else raise Hang."""

    @abstractmethod
    def read_config(self, offset: int, size: int) -> bytes:
        """Return *size* bytes of the device configuration."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """Write device configuration, as a driver does."""

    @abstractmethod
    def leave(self) -> None:
        """Close the connection in any state."""

    @property
    def process(self) -> Process:
        """The back-end's process."""
        assert self.target.process is not None
        return self.target.process

    # -- bringing it up ----------------------------------------------------------------------

    def need(self, bit: int, name: str) -> None:
        """Skip the test as not applicable unless feature *bit* is offered."""
        if not f.has(self.offered, bit):
            not_applicable(f"{name} is not offered")

    def bring_up(
        self,
        *bits: int,
        size: int = RING_SIZE,
        queues: Sequence[int] | None = None,
        extra: int = 0,
        ready: bool = True,
        configure: Callable[[], None] | None = None,
    ) -> DriverRing:
        """Negotiate VERSION_1, the ring layout and *bits*; start the rings; return the main one.

        *bits* have to be offered (:meth:`need`); *extra* are device features as a mask;
        *configure* runs after negotiation and before the rings start, to write configuration.
        A failure here is one of set-up: without an :func:`about` around it, no row is accused.
        """
        if not self.profile.has_requests:
            not_applicable("no device profile, so no valid request is known")
        for bit in bits:
            self.need(bit, f"feature {bit}")
        wanted = f.mask(f.VIRTIO_F_VERSION_1, *bits) | self.profile.features | extra
        wanted |= f.mask(f.VIRTIO_F_RING_PACKED) if self.packed else 0
        with preparing():
            self.negotiate(wanted & self.offered)
            if configure:
                configure()
            for index in self.profile.queues if queues is None else queues:
                self.start_ring(index, self.make_ring(size))
            if ready:
                self.driver_ok()
                self.profile.prepare(self)
        return self.rings.get(self.profile.main) or next(iter(self.rings.values()))

    def make_ring(
        self, size: int = RING_SIZE, *, start: int = 0, region: int | None = None
    ) -> DriverRing:
        """Return a new ring in guest memory, with the negotiated layout and event handling."""
        event_idx = f.has(self.features, f.VIRTIO_F_EVENT_IDX)
        kind = PackedRing if self.packed else SplitRing
        region = self.ring_region if region is None else region
        return kind(self.ram, size, event_idx=event_idx, start=start, region=region)

    def ring_row(self, split: str, packed: str = "") -> str:
        """Return the row of the layout under test: ``split.`` or ``packed.`` and its name."""
        return f"packed.{packed or split}" if self.packed else f"split.{split}"

    @property
    def main(self) -> DriverRing:
        """The ring that requests are put into."""
        return self.rings[self.profile.main]

    @property
    def main_split(self) -> SplitRing:
        """The main ring, if it is a split one."""
        assert isinstance(self.main, SplitRing)
        return self.main

    @property
    def main_packed(self) -> PackedRing:
        """The main ring, if it is a packed one."""
        assert isinstance(self.main, PackedRing)
        return self.main

    # -- requests ----------------------------------------------------------------------------

    def place(
        self, exchange: Exchange, *, cut: Sequence[int] = (), region: int = 1, align: int = 64
    ) -> Placed:
        """Write a request to memory and return it; *cut* has the sizes of the first descriptors."""
        segments: list[Segment] = []
        writable_at = 0
        if exchange.readable:
            start = self.ram.alloc(len(exchange.readable), align, region)
            self.ram.write(start, exchange.readable)
            segments += cut_up(start, len(exchange.readable), cut, write=False)
        if exchange.writable:
            writable_at = self.ram.alloc(exchange.writable, align, region)
            self.ram.write(writable_at, bytes([FILL]) * exchange.writable)
            segments += cut_up(writable_at, exchange.writable, cut, write=True)
        return Placed(exchange, segments, writable_at)

    def request(self, serial: int = 0, **how: Any) -> Placed:
        """Write a valid request of this device to memory and return it."""
        return self.place(self.profile.exchange(self, serial), **how)

    def submit(self, placed: Placed, *, queue: int | None = None, indirect: bool = False) -> Placed:
        """Add a request to a ring without showing it to the device yet."""
        ring = self.rings[self.profile.main if queue is None else queue]
        table = self.ram.alloc(16 * len(placed.segments), 16, 1) if indirect else 0
        placed.id = ring.add(placed.segments, indirect=table, publish=False)
        return placed

    def run(
        self,
        exchanges: Sequence[Exchange | Placed],
        *,
        queue: int | None = None,
        watch: bool = True,
        limit: float | None = None,
        indirect: bool = False,
    ) -> list[Used]:
        """Put requests through a ring, check the results, and return the used elements.

        Raise a finding for a wrong id, length or answer, and (with *watch*) for other memory that
        changed.
        """
        index = self.profile.main if queue is None else queue
        ring = self.rings[index]
        placed = [p if isinstance(p, Placed) else self.place(p) for p in exchanges]
        for one in placed:
            self.submit(one, queue=index, indirect=indirect)
        before = self.ram.picture() if watch else None
        ring.publish()
        self.kick(index)
        used = self.collect(ring, len(placed), limit)
        self.check(placed, used)
        faults = [p.exchange.effect() for p in placed if index == self.profile.main]
        if any(faults):
            raise Finding(next(filter(None, faults)))
        if before is not None:
            self.ram.expect_untouched(before, self.allowed(placed))
        return used

    def warm_up(self) -> None:
        """Put one request through.  If it fails, what comes after is inconclusive."""
        with preparing():
            self.run([self.profile.exchange(self, 0)])

    def collect(self, ring: DriverRing, count: int, limit: float | None = None) -> list[Used]:
        """Return *count* buffers; raise Hang after *limit* seconds (default: the answer limit)."""
        return ring.collect(count, self.target.options.answer_limit if limit is None else limit)

    def check(self, placed: Sequence[Placed], used: Sequence[Used]) -> None:
        """Check that every request came back once, with a valid length and answer."""
        by_id = {one.id: one for one in placed}
        for element in used:
            one = by_id.pop(element.id, None)
            if one is None:
                told = f"buffer {element.id} came back, which is none of {list(by_id)}"
                raise Finding(told, row=self.ring_row("used.id"))
            room = one.exchange.writable
            if element.len > room:
                told = f"used length {element.len} for {room} device-writable bytes"
                raise Finding(told, row=self.ring_row("used.len-written"))
            data = self.ram.read(one.writable_at, room) if room else b""
            fault = one.exchange.verify(element.len, data)
            if fault:
                raise Finding(fault)
        if by_id:
            raise Finding(f"buffers {list(by_id)} did not come back")

    def allowed(
        self, placed: Sequence[Placed] = (), rings: Sequence[DriverRing] | None = None
    ) -> list[tuple[int, int]]:
        """Return the memory that may change: the device's ring areas, writable buffers, effects."""
        spans: list[tuple[int, int]] = []
        for ring in self.rings.values() if rings is None else rings:
            spans += [*ring.device_span, *ring.publish_span]
        for one in placed:
            spans += one.exchange.may_change
            spans += [(s.addr, s.addr + s.len) for s in one.segments if s.write]
        return spans

    @property
    def discards(self) -> bool:
        """Whether freed pages are expected to become holes: not with discards switched off."""
        return self.target.options.discards

    @property
    def has_status(self) -> bool:
        """Whether the transport carries the device status, DRIVER_OK above all."""
        return True

    def describe(self) -> list[str]:
        """Return lines for a report: the newest buffers of each ring, and its content."""
        return [
            line
            for index, ring in self.rings.items()
            for line in (f"queue {index}:", *ring.describe())
        ]

    # -- afterwards --------------------------------------------------------------------------

    def main_quiet(self, seconds: float) -> None:
        """Give the device *seconds* to process its buffers."""
        time.sleep(seconds)

    def change_configuration(self) -> None:
        """Run the operator's command that changes the device's configuration."""
        self.target.change_configuration(self.main_quiet)

    def expect_quiet(self, seconds: float = 0.1) -> None:
        """Raise a finding if a buffer comes back on the main ring within *seconds*."""
        self.main_quiet(seconds)
        found = self.main.poll()
        if found:
            raise Finding(f"buffers came back that must not: {found[:4]}")

    def survive(self, *, spinning: bool = False) -> None:
        """Check for crashes and hangs after malformed input, and with *spinning* for busy loops."""
        self.target.expect_healthy()
        if not self.target.gone:
            self.usable()
            if spinning and not self.target.options.polls and not self.process.settles():
                raise Finding("the back-end continues to use a whole processor")
        self.target.expect_healthy()

    def close(self) -> None:
        """Disconnect and free everything."""
        with contextlib.suppress(OSError, AttributeError):  # connecting may have failed halfway
            self.leave()
        for event in (*self.kicks.values(), *self.calls.values()):
            event.close()
        self.rings.clear()
        self.ram.close()
