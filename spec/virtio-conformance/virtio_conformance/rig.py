# SPDX-License-Identifier: Apache-2.0
"""A device brought up over one transport, with rings that requests can be put through.

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
"""Descriptors of a ring where a test does not care: far below what any backend supports."""


@dataclass
class Placed:
    """A request in guest memory."""

    exchange: Exchange
    segments: list[Segment]
    writable_at: int = 0
    id: int = -1


class Rig(ABC):
    """One device, one connection, and the driver's side of its rings."""

    transport: str
    can_stop = False
    """Whether a single ring can be stopped and started again."""
    ring_region = 0
    """The region of memory that rings are made in."""
    frees = True
    """Whether a balloon is known to free the pages that it is given; it need not."""
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
        except BaseException:  # nobody has this device yet: a server may wait for its leaving
            self.close()
            raise

    # -- transport ---------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> None:
        """Open the connection and learn what is offered."""

    @property
    @abstractmethod
    def offered(self) -> int:
        """The virtio feature bits that the device offers."""

    @abstractmethod
    def negotiate(self, features: int) -> None:
        """Settle features and hand over memory; a refusal is a finding."""

    @abstractmethod
    def start_ring(self, index: int, ring: DriverRing, *, base: int | None = None) -> None:
        """Program a ring and start it; *base* is where it starts, if not at 0."""

    @abstractmethod
    def driver_ok(self) -> None:
        """All rings are there: the driver is ready."""

    @abstractmethod
    def kick(self, index: int) -> None:
        """Notify the device, whether it asked for that or not."""

    @abstractmethod
    def usable(self) -> bool:
        """Whether the connection answers (true) or was closed (false); a hang is a finding."""

    @abstractmethod
    def read_config(self, offset: int, size: int) -> bytes:
        """Device configuration."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """Write device configuration, as a driver does."""

    @abstractmethod
    def leave(self) -> None:
        """Close the connection, whatever state it is in."""

    @property
    def process(self) -> Process:
        """The backend's process."""
        assert self.target.process is not None
        return self.target.process

    # -- bringing it up ----------------------------------------------------------------------

    def need(self, bit: int, name: str) -> None:
        """The test needs a feature; without it, it is not applicable."""
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
        *configure* runs between negotiation and the rings, where a driver writes configuration.
        What fails here is set-up: without an :func:`about` around it, it accuses nobody.
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
        """A ring of the layout and event handling that are negotiated, in guest memory."""
        event_idx = f.has(self.features, f.VIRTIO_F_EVENT_IDX)
        kind = PackedRing if self.packed else SplitRing
        region = self.ring_region if region is None else region
        return kind(self.ram, size, event_idx=event_idx, start=start, region=region)

    def ring_row(self, split: str, packed: str = "") -> str:
        """Return the row of the layout under test: ``split.`` or ``packed.`` and its name."""
        return f"packed.{packed or split}" if self.packed else f"split.{split}"

    @property
    def main(self) -> DriverRing:
        """The ring that requests go to."""
        return self.rings[self.profile.main]

    @property
    def main_split(self) -> SplitRing:
        """The main ring, which is a split one."""
        assert isinstance(self.main, SplitRing)
        return self.main

    @property
    def main_packed(self) -> PackedRing:
        """The main ring, which is a packed one."""
        assert isinstance(self.main, PackedRing)
        return self.main

    # -- requests ----------------------------------------------------------------------------

    def place(
        self, exchange: Exchange, *, cut: Sequence[int] = (), region: int = 1, align: int = 64
    ) -> Placed:
        """Put a request into memory; *cut* are the sizes of the first descriptors."""
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
        """A valid request of this device, in memory."""
        return self.place(self.profile.exchange(self, serial), **how)

    def submit(self, placed: Placed, *, queue: int | None = None, indirect: bool = False) -> Placed:
        """Add a request to a ring without showing it to the device yet."""
        ring = self.rings[self.profile.main if queue is None else queue]
        table = self.ram.alloc(16 * len(placed.segments), 16, 1) if indirect else 0
        placed.id = ring.add(placed.segments, indirect=table, publish=False)
        return placed

    def run(
        self, exchanges: Sequence[Exchange | Placed], *, queue: int | None = None,
        watch: bool = True, limit: float | None = None, indirect: bool = False,
    ) -> list[Used]:  # fmt: skip
        """Put requests through a ring and check everything about them.

        Ids, lengths and answers have to fit, and (with *watch*) nothing else in memory changes.
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
        """Put one request through; without that nothing can be said of what comes after."""
        with preparing():
            self.run([self.profile.exchange(self, 0)])

    def collect(self, ring: DriverRing, count: int, limit: float | None = None) -> list[Used]:
        """Wait for buffers; :class:`Hang` after *limit* seconds (default: the answer limit)."""
        return ring.collect(count, self.target.options.answer_limit if limit is None else limit)

    def check(self, placed: Sequence[Placed], used: Sequence[Used]) -> None:
        """Every request came back once, with a length and an answer that fit."""
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
        """Memory that may change: the device's ring areas, writable buffers, effects."""
        spans: list[tuple[int, int]] = []
        for ring in self.rings.values() if rings is None else rings:
            spans += [*ring.device_span, *ring.publish_span]
        for one in placed:
            spans += one.exchange.may_change
            spans += [(s.addr, s.addr + s.len) for s in one.segments if s.write]
        return spans

    @property
    def discards(self) -> bool:
        """Whether a balloon has to free pages: it was not told not to, and can reach them."""
        return self.target.options.discards

    @property
    def has_status(self) -> bool:
        """Whether the transport carries the device status, DRIVER_OK above all."""
        return True

    def describe(self) -> list[str]:
        """Return what the rings were given and how they stand, for a report."""
        return [
            line for index, ring in self.rings.items()
            for line in (f"queue {index}:", *ring.describe())
        ]  # fmt: skip

    # -- the aftermath -----------------------------------------------------------------------

    def main_quiet(self, seconds: float) -> None:
        """Let the device do whatever it does with what it was given."""
        time.sleep(seconds)

    def change_configuration(self) -> None:
        """Have the operator change the device's configuration."""
        self.target.change_configuration(self.main_quiet)

    def expect_quiet(self, seconds: float = 0.1) -> None:
        """Nothing comes back on the main ring for a while; whatever does is a finding."""
        self.main_quiet(seconds)
        found = self.main.poll()
        if found:
            raise Finding(f"buffers came back that must not: {found[:4]}")

    def survive(self, *, spinning: bool = False) -> None:
        """After something malformed: no crash, no hang, and with *spinning* no busy loop."""
        self.target.expect_healthy()
        if not self.target.gone:
            self.usable()
            if spinning and not self.target.options.polls and not self.process.settles():
                raise Finding("the backend goes on using a whole processor")
        self.target.expect_healthy()

    def close(self) -> None:
        """Leave and free everything."""
        with contextlib.suppress(OSError, AttributeError):  # it may not have come far
            self.leave()
        for event in (*self.kicks.values(), *self.calls.values()):
            event.close()
        self.rings.clear()
        self.ram.close()
