# SPDX-License-Identifier: Apache-2.0
"""The balloon: one virtio device made of its queues' handlers, the skip map and the rounds."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vballoon.balloon import persist, target
from vballoon.balloon.commands import CommandRounds
from vballoon.balloon.config import ConfigSpace
from vballoon.balloon.counters import Counters
from vballoon.balloon.hinting import HintQueue
from vballoon.balloon.inflate import InflateQueues
from vballoon.balloon.reporting import ReportQueue
from vballoon.balloon.roles import NUM_QUEUES, Role, numberings, settle_roles
from vballoon.balloon.stats import GuestStats, StatsQueue
from vballoon.balloon.walking import WalkQueue
from vballoon.errors import QueueError, UsageError
from vballoon.memory import PAGE_SHIFT, Discarder, GuestMemory
from vballoon.sizes import Limits, size_text
from vballoon.skipmap import Round, RoundKind, SkipMap, VoidReason
from vballoon.skipmap.map import SkipMapState
from vballoon.virtio import VirtioDevice
from virtio_formats.virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    VIRTIO_ID_BALLOON,
    BalloonFeature,
    StatTag,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from vballoon.virtio import DeviceQueue, Transport
    from vballoon.virtqueue import ChainBatch

__all__ = ("ALL_FEATURES", "Balloon")

log = logging.getLogger(__name__)

ALL_FEATURES = (
    BalloonFeature.MUST_TELL_HOST
    | BalloonFeature.STATS_VQ
    | BalloonFeature.DEFLATE_ON_OOM
    | BalloonFeature.FREE_PAGE_HINT
    | BalloonFeature.PAGE_POISON
    | BalloonFeature.PAGE_REPORTING
    | BalloonFeature.FREE_PAGE_WALK
)
"""Everything that the device can do; MUST_TELL_HOST is among it because a page whose deflation
is announced first can leave the skip bitmap in time."""

# As plain numbers: these are asked for with every batch, and an enumeration's operators are slow.
_MUST_TELL_HOST, _PAGE_POISON = int(BalloonFeature.MUST_TELL_HOST), int(BalloonFeature.PAGE_POISON)


class Balloon(VirtioDevice):
    """The memory balloon device (*Memory Balloon Device*, device ID 5).

    *features* are the device-specific bits to offer; with *discard* off no page is ever taken
    from guest memory (for guests whose memory is pinned by a passed-through device).  *limits* are
    the operator's, for targets.
    """

    device_id = VIRTIO_ID_BALLOON
    num_queues = NUM_QUEUES
    pci_class = 0x00FF00

    def __init__(
        self,
        features: int = ALL_FEATURES,
        *,
        discard: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self._features = int(features)
        self._limits = limits or Limits()
        self._wanted_pages = 0  # the operator's; num_pages can be less for a small guest
        self._assumed: int | None = None  # the guest's size in bytes when the target was set
        self._inherited = True  # the driver's first statistics have not arrived
        self.counters = Counters()
        self.discarder = Discarder(enabled=discard)
        self.config = ConfigSpace(walk=bool(features & BalloonFeature.FREE_PAGE_WALK))
        self.skipmap = SkipMap(GuestMemory(), discards=discard)
        self.events: Callable[[str, dict[str, Any]], None] = lambda name, data: None
        self.stats_interval = 0
        """Seconds between two requests for statistics; 0: none.  The operator's, kept here."""
        self.stats_queue = StatsQueue(self.counters)
        self.hints = CommandRounds(
            RoundKind.HINT,
            begin=self._begin_round,
            publish=self._publish_hint,
            ended=self._round_ended,
        )
        self.walks = CommandRounds(
            RoundKind.WALK,
            begin=self._begin_round,
            publish=self._publish_walk,
            ended=self._round_ended,
        )
        self._hint_queue = HintQueue(self.counters, self.hints)
        self.walk_queue = WalkQueue(self.counters, self.walks)
        self._inflate = InflateQueues(self.counters, self.discarder)
        self._report = ReportQueue(self.counters, self.discarder)
        self.roles: dict[int, Role] = {}
        self._passed_over: set[int] = set()  # queues without a role yet
        self._settled_for: int | None = None  # the features for which all roles are known
        self._loaded: persist.BalloonState | None = None  # until its guest continues

    # What the transport asks.

    @property
    def device_features(self) -> int:
        """The device-specific feature bits offered."""
        return self._features

    def read_config(self) -> bytes:
        """Return the current configuration space."""
        return self.config.read()

    def write_config(self, offset: int, data: bytes) -> None:
        """Apply a driver's write; a change of ``actual`` is an event."""
        if self.config.write(offset, data):
            self.events("BALLOON_CHANGE", {"actual": self.actual_bytes})

    def attach(self, transport: Transport) -> None:
        """Connect the device to *transport* and its guest memory."""
        super().attach(transport)
        self.memory_changed()

    def start(self) -> None:
        """Settle the queues' roles from the features and from the rings that are there."""
        assert self.transport is not None  # a transport starts what it has attached to
        self._settle_roles(self.transport.features, self.transport.queues)
        self.config.lock()
        self.skipmap.set_driver_running(True)
        if self._loaded is not None:  # memory may have come after the state
            self.skipmap.set_restored(self._loaded.skipmap)
            self._loaded = None
        poisons = self.transport.features & BalloonFeature.PAGE_POISON
        self.skipmap.poison = self.config.fields.poison_val if poisons else None

    def _settle_roles(self, features: int, present: Collection[int]) -> None:
        """Roles that are all known stay, whatever ring is stopped or reset meanwhile."""
        if self._settled_for == features and set(present) <= self.roles.keys():
            return
        self.roles = settle_roles(features, present)
        complete = any(set(present) == {0, 1, *numbers} for numbers in numberings(features))
        self._settled_for = features if complete else None

    def process(self, queue: DeviceQueue) -> bool:
        """Leave a ring alone whose role depends on rings that are still to be set up."""
        assert self.transport is not None  # a transport brought the queue
        if queue.index not in self.roles:
            dense, fixed = numberings(self.transport.features)
            if queue.index in dense and queue.index in fixed:
                self._passed_over.add(queue.index)
                return False
        return super().process(queue)

    def overdue(self) -> Collection[int]:
        """Rings that have a role now and had none when they were looked at."""
        found = self._passed_over & self.roles.keys()
        self._passed_over -= found
        return found

    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        """Serve a batch according to the queue's role."""
        role = self.roles.get(queue.index)
        match role:
            case Role.INFLATE:
                self._inflate.inflate(queue, batch, self.skipmap, tells=self._driver_tells)
            case Role.DEFLATE:
                self._inflate.deflate(queue, batch, self.skipmap)
            case Role.STATS:
                self.stats_queue.handle(queue, batch, self.config.fields.actual << PAGE_SHIFT)
                self._check_inherited()
            case Role.HINT:
                self._hint_queue.handle(queue, batch, self.skipmap)
            case Role.REPORT:
                self._report.handle(queue, batch, self.skipmap, discard=not self.poisoned)
            case Role.WALK:
                self.walk_queue.handle(queue, batch, self.skipmap)
            case None:
                raise QueueError("queue-without-role", "no negotiated feature has this queue")

    @property
    def _driver_tells(self) -> bool:
        """Whether the driver uses no ballooned page before the host has acknowledged it."""
        assert self.transport is not None  # a transport brought the queue
        return bool(self.transport.features & _MUST_TELL_HOST)

    def stop(self) -> None:
        """Give the statistics buffer back while its ring still runs."""
        self.skipmap.set_driver_running(False)  # a pause, or a guest that starts anew
        self.stats_queue.release()
        self.config.unlock()

    def reset(self) -> None:
        """Reset the device: drop all state of the previous driver."""
        self._forget()
        self.config.reset()
        self.config.fields.num_pages = self._wanted_pages

    def restart(self) -> None:
        """Reset at the next driver's start, whose ``poison_val`` may already be written."""
        self._forget()
        self.config.reset(keep_poison=True)
        self.config.fields.num_pages = self._wanted_pages

    def _forget(self) -> None:
        self._void(VoidReason.RESET)
        self.discarder.forget()
        self._forget_driver()

    def _forget_driver(self) -> None:
        self.walk_queue.reset()
        self.stats_queue.reset()
        self._inherited = True
        self.roles, self._settled_for, self._loaded = {}, None, None
        self._passed_over.clear()

    def memory_changed(self) -> None:
        """Another memory table: rounds are void, bits of regions that went are gone."""
        assert self.transport is not None
        self.skipmap = self.skipmap.rebuilt(self.transport.memory)
        self._end_rounds(VoidReason.MEMORY_CHANGED)
        self._release_pages()
        self.walk_queue.memmap.reset()  # it described another memory map [WALK-D14]

    def _release_pages(self) -> None:
        """Let the driver free the pages that it holds for a round that is void now."""
        fields = self.config.fields
        if fields.free_page_hint_cmd_id >= CMD_ID_FIRST:
            self._publish_hint(CMD_ID_DONE)
        if fields.free_page_walk_cmd_id >= CMD_ID_FIRST:
            self._publish_walk(CMD_ID_DONE)

    def detach(self) -> None:
        """Disconnect from the front-end and void the rounds, which belong to its connection."""
        self._void(VoidReason.FRONTEND_LOST)
        self.skipmap.set_driver_running(False)
        self._forget_driver()
        super().detach()

    # What the operator asks.

    @property
    def ram_bytes(self) -> int:
        """Size of guest memory in bytes; 0 while no front-end is connected."""
        return self.transport.memory.size if self.transport is not None else 0

    @property
    def guest_bytes(self) -> int:
        """The guest's memory in bytes, the balloon included: see :mod:`vballoon.balloon.target`."""
        return target.size(self._guest(), self._limits)

    @property
    def actual_bytes(self) -> int:
        """The guest's logical size: its memory less what is in the balloon (QEMU's ``actual``)."""
        return max(0, self.guest_bytes - (self.config.fields.actual << PAGE_SHIFT))

    @property
    def driver_running(self) -> bool:
        """Whether the guest's driver is known to run: whether any ring runs.

        While it is not, the balloon, the rounds and the statistics may be those of an earlier boot.
        """
        return self.skipmap.driver_running

    @property
    def target_bytes(self) -> int:
        """What the operator has asked for: guest memory less what should be in the balloon."""
        return max(0, self.guest_bytes - (self.config.fields.num_pages << PAGE_SHIFT))

    @property
    def floor_bytes(self) -> int:
        """The lowest target in bytes that is accepted without *force*."""
        return target.floor(self._guest(), self._limits)

    @property
    def poisoned(self) -> bool:
        """Free pages must keep a value that is not what a hole reads as (PAGE_POISON)."""
        negotiated = self.transport is not None and self.transport.features & _PAGE_POISON
        return bool(negotiated) and self.config.fields.poison_val != 0

    def set_target(self, value: int, *, force: bool = False) -> None:
        """Ask the guest to have *value* bytes (as QEMU's ``balloon``): the rest goes in.

        Raise UsageError without a guest, and, unless *force*, without a running driver or for a
        target that :func:`vballoon.balloon.target.check` refuses.
        """
        if not self.ram_bytes:
            raise UsageError("no guest memory yet: wait until a front-end has connected")
        if value <= 0:
            raise UsageError("the target is the guest's memory in bytes and must be above 0")
        if not force:
            if not self.driver_running:
                raise UsageError(
                    "no balloon driver runs in the guest: it boots, is paused, or has not loaded "
                    "virtio_balloon; force=true sets the target for the next driver"
                )
            now = min(self.actual_bytes, self.target_bytes)
            target.check(value, self._guest(), self._limits, now=now)
        self._assumed = self.guest_bytes
        self._wanted_pages = min(max(0, self._assumed - value) >> PAGE_SHIFT, 0xFFFF_FFFF)
        self.config.fields.num_pages = self._wanted_pages
        self._config_changed()

    def _guest(self) -> target.Guest:
        """Return what is known of the guest's memory."""
        stats = self.stats_queue.latest
        features = self.transport.features if self.transport is not None else 0
        return target.Guest(
            mapped=self.ram_bytes,
            total=stats.values.get(StatTag.MEMTOT),
            available=stats.values.get(StatTag.AVAIL, stats.values.get(StatTag.MEMFREE)),
            ballooned=stats.ballooned,
            total_has_balloon=bool(features & BalloonFeature.DEFLATE_ON_OOM),
        )

    def _check_inherited(self) -> None:
        """Limit the target of an earlier driver once, when a new one reports its memory."""
        if not self._inherited:
            return
        self._inherited = False
        assumed = self._assumed or self._limits.memory or self.ram_bytes
        wanted = self._wanted_pages << PAGE_SHIFT
        pages = target.inherited(wanted, assumed, self._guest()) >> PAGE_SHIFT
        if pages != self.config.fields.num_pages:
            log.warning(
                "the guest has started anew with %s of memory: the balloon's target is limited "
                "to %s",
                size_text(self.guest_bytes),
                size_text(pages << PAGE_SHIFT),
            )
            self.config.fields.num_pages = pages
            self._config_changed()

    def stats(self) -> GuestStats:
        """Return the latest memory statistics."""
        return self.stats_queue.latest

    def request_stats(self) -> bool:
        """Ask the driver for new statistics; False when it has not given us a buffer."""
        return self.stats_queue.request()

    def start_hinting(self, *, hold: bool = False) -> int:
        """Begin a free page hinting round; returns its id."""
        self._require(Role.HINT, "free page hinting (feature FREE_PAGE_HINT)")
        self._hint_queue.reset()
        return self.hints.start(hold=hold).id

    def stop_hinting(self) -> None:
        """End hinting: the driver takes its pages back."""
        self.hints.stop()

    def start_walk(self, min_order: int = 0) -> int:
        """Begin a walk round down to blocks of ``1 << min_order`` pages; returns its id."""
        self._require(Role.WALK, "the free page walk (feature 63 and the vballoon_walk module)")
        self.walk_queue.forget_round()
        if self.config.fields.free_page_walk_cmd_id >= CMD_ID_FIRST:
            self.walks.void("superseded by a newer round")
            self._publish_walk(CMD_ID_STOP)  # the order must not change under a standing id
        self.config.fields.free_page_walk_min_order = min_order
        return self.walks.start().id

    def stop_walk(self) -> None:
        """End the walk."""
        self.walks.stop()

    # State that outlives the process or travels with the guest.

    def state(self, *, pages: bool = True) -> persist.BalloonState:
        """Return what a balloon needs to continue elsewhere.

        Without *pages* no bit of the skip map is in it, so that it is small and made quickly.
        """
        fields = self.config.fields
        bits = self.skipmap.state() if pages else SkipMapState()
        if pages and self._loaded is not None:  # not all of its memory may be there yet
            kept = self._loaded.skipmap
            bits = replace(
                bits,
                ballooned=bits.ballooned | kept.ballooned,
                reported=bits.reported | kept.reported,
            )
        return persist.BalloonState(
            num_pages=fields.num_pages,
            actual=fields.actual,
            poison_val=fields.poison_val,
            hint_next_id=self.hints.next_id,
            walk_next_id=self.walks.next_id,
            stats_interval=self.stats_interval,
            roles=tuple(sorted(self.roles.items())),
            settled_for=self._settled_for,
            skipmap=bits,
        )

    def restore(self, state: persist.BalloonState) -> None:
        """Continue from *state*.  Raise :class:`~vballoon.errors.ProtocolError` if it is invalid.

        Nothing is changed then.  Rounds are void, and the driver gets back the pages that it holds
        for one.  A statistics buffer that the driver keeps in the queue comes from the ring again.
        """
        persist.check(state)
        self._forget()  # of rounds, layout and balloon of whatever guest was here before
        fields = self.config.fields
        fields.num_pages, fields.actual = state.num_pages, state.actual
        self._wanted_pages, self._inherited = state.num_pages, False  # its driver continues
        fields.poison_val = state.poison_val
        self.hints.next_id, self.walks.next_id = state.hint_next_id, state.walk_next_id
        self.stats_interval = state.stats_interval
        self.roles, self._settled_for = dict(state.roles), state.settled_for
        self.skipmap.restore(state.skipmap)
        self._loaded = state
        # The guest may hold pages for a round that ended with the process.
        self._publish_hint(CMD_ID_DONE)
        self._release_pages()

    def save(self) -> bytes:
        """Return the packed state for a migrating front-end (``vballoon_spec.state``)."""
        return persist.pack(self.state())

    def load(self, state: bytes) -> None:
        """Continue from a packed state.  Raise :class:`~vballoon.errors.ProtocolError`."""
        self.restore(persist.unpack(state))

    # Within.

    def _require(self, role: Role, what: str) -> None:
        if role not in self.roles.values():
            raise UsageError(f"the guest's driver has not negotiated {what}")

    def _void(self, reason: VoidReason) -> None:
        """End the rounds and clear the bits that do not survive *reason*."""
        self._end_rounds(reason)
        self.skipmap.void(reason)

    def _end_rounds(self, reason: VoidReason) -> None:
        self.hints.reset(reason)
        self.walks.reset(reason)
        self._hint_queue.reset()
        self.walk_queue.forget_round()

    def _begin_round(self, begun: Round) -> None:
        self.skipmap.begin_round(begun)

    def _publish_hint(self, cmd_id: int) -> None:
        self.config.fields.free_page_hint_cmd_id = cmd_id
        self._config_changed()

    def _publish_walk(self, cmd_id: int) -> None:
        self.config.fields.free_page_walk_cmd_id = cmd_id
        self._config_changed()

    def _config_changed(self) -> None:
        if self.transport is not None:
            self.transport.config_changed()

    def _round_ended(self, ended: Round) -> None:
        self.events("ROUND_COMPLETED", ended.as_dict())
