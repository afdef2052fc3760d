# SPDX-License-Identifier: Apache-2.0
"""One vring: what the front-end has said about it, and the virtqueue built from that.

"Ring states" of vhost-user.rst (QEMU 11.1.3): started or stopped, and independently of that
enabled or disabled.  SET_VRING_KICK starts a ring, GET_VRING_BASE stops it; the standard asks
not to wait for a first kick.  A started ring that is disabled is left alone: a balloon has
nothing that it could process "without side effects".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.errors import ProtocolError
from vballoon.vhost_user.inflight_packed import PackedInflight
from vballoon.vhost_user.inflight_split import SplitInflight
from vballoon.vhost_user.state import VringState
from vballoon.virtqueue import Resubmit, RingAddresses, RingState, make_virtqueue
from virtio_formats.vhost_user import VringFlag
from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed as packed_ring
from virtio_formats.virtio import split as split_ring

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vballoon.memory import GuestMemory
    from vballoon.vhost_user.inflight import InflightArea
    from vballoon.vhost_user.slots import Slots
    from vballoon.virtio import RingRecord
    from vballoon.virtqueue import Engine, Virtqueue
    from virtio_formats.vhost_user import VhostVringAddr

__all__ = ("MAX_QUEUE_SIZE", "Vring", "decode_base", "encode_base")

MAX_QUEUE_SIZE = 32768
"""Descriptors in a ring (virtio: *Virtqueues*)."""

_INDEX15 = 0x7FFF
_EVENTS = ("kick", "call", "err")
_FLAGS = packed_ring.PvirtqDesc.SIZE - 2


def decode_base(num: int, *, packed: bool) -> RingState:
    """SET_VRING_BASE's number ("Vring descriptor indices for packed virtqueues", "… split …").

    A split ring's used index is not in it; the caller reads that from the ring.
    """
    if not packed:
        if num > 0xFFFF:
            raise ProtocolError("vring-base", f"{num:#x}: bits 16 to 31 are reserved")
        return RingState(avail=num)
    avail, used = num & 0xFFFF, num >> 16
    if not used and avail:
        # DPDK's front-end sends the avail half only.  Nothing is in flight on a ring that begins
        # without a record, so the used position equals the avail position.
        used = avail
    return RingState(
        avail=avail & _INDEX15,
        avail_wrap=bool(avail >> 15),
        used=used & _INDEX15,
        used_wrap=bool(used >> 15),
    )


def encode_base(state: RingState, *, packed: bool) -> int:
    """Return GET_VRING_BASE's number for a ring with position *state*."""
    if not packed:
        return state.avail
    return state.avail | state.avail_wrap << 15 | state.used << 16 | state.used_wrap << 31


class Vring:
    """The state of ring *index*; descriptors in it are owned and closed by it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick: int | None = None
        self.call: int | None = None
        self.err: int | None = None
        self.num = 0
        self.addr: VhostVringAddr | None = None
        self.base: int | None = None
        self.started = False
        self.enabled = False
        self.busy = False  # more to process: already in the loop's queue
        self._log: SplitInflight | PackedInflight | None = None
        self._packed = False
        self.resumed = False
        """Whether this life of the ring continues one that ended in a crash."""
        self.recovered = 0
        """Buffers that a record in the in-flight area gave back to this ring."""
        self._restored = False  # it was not built yet by this process
        self._interrupted = False  # the process before this one died while it served the ring
        self._keys = dict.fromkeys(_EVENTS, 0)  # how often each descriptor was replaced

    # -- descriptors --------------------------------------------------------------------------

    def set_fd(self, name: str, fd: int | None) -> None:
        """Replace the descriptor *name* (``kick``, ``call``, ``err``)."""
        old = getattr(self, name)
        setattr(self, name, fd)
        self._keys[name] += 1
        if old is not None:
            close_fds([old])

    def close(self) -> None:
        """Close every descriptor."""
        for name in _EVENTS:
            self.set_fd(name, None)

    # -- the virtqueue ------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether everything that makes a ring is known."""
        return self.started and self.num > 0 and self.addr is not None

    def addresses(self, memory: GuestMemory) -> RingAddresses:
        """Return the ring's guest-physical addresses.  Raise MemoryFault outside guest memory."""
        assert self.addr is not None
        return RingAddresses(
            desc=memory.from_userspace(self.addr.descriptor),
            driver=memory.from_userspace(self.addr.available),
            device=memory.from_userspace(self.addr.used),
        )

    def build(
        self,
        memory: GuestMemory,
        features: int,
        area: InflightArea | None,
        record: RingRecord,
        *,
        engine: Engine = "batch",
    ) -> Virtqueue:
        """Return the virtqueue, from where it was parked or where the base or the area says.

        Raise :class:`~vballoon.errors.PeerError` when the ring cannot be served.
        """
        assert self.addr is not None
        addresses = self.addresses(memory)
        state, resubmit = record.position, None
        unclaimed = self._unclaimed(record)
        # The record knows more than a position that another process has left.
        if state is None or unclaimed or (self._restored and area is not None):
            state, resubmit = self._begin(memory, addresses, features, area)
        ring = make_virtqueue(
            memory,
            self.num,
            addresses,
            features,
            state,
            engine=engine,
            inflight=self._log,
            dirty_ring=self.addr.log if self.addr.flags & VringFlag.LOG else None,
            resubmit=resubmit,
        )
        self._restored = False
        if resubmit is not None:
            self.resumed = True
            self.recovered += len(resubmit.ids) - unclaimed
        return ring

    def _unclaimed(self, record: RingRecord) -> int:
        """Return how many recovered buffers the parked virtqueue had not handed out again."""
        if record.position is None or self._log is None:
            return 0
        return self._log.in_flight - record.outstanding

    def _begin(
        self, memory: GuestMemory, at: RingAddresses, features: int, area: InflightArea | None
    ) -> tuple[RingState, Resubmit | None]:
        """Return the state of a ring that starts, from its base or the in-flight record."""
        packed = self._packed = f.has(features, f.VIRTIO_F_RING_PACKED)
        state = self.base_state(packed=packed)
        if not packed:
            used = memory.read(at.device + split_ring.USED_IDX_OFFSET, 2)
            state = RingState(avail=state.avail, used=int.from_bytes(used, "little"))
        region = area.region(self.index, packed=packed) if area else None
        if area is None or region is None:
            self._log = None
            return self._unrecorded(state), None
        if area.queue_size < self.num:
            raise ProtocolError("inflight-area", f"for {area.queue_size} descriptors")
        if packed:
            return self._begin_packed(memory, at, state, PackedInflight(region, self.num))
        return self._begin_split(state, SplitInflight(region, self.num))

    def _unrecorded(self, state: RingState) -> RingState:
        """Return where a ring without a record starts, given its base and its used index.

        If the process before this one died while it served the ring, the base is outdated.  Every
        buffer that is not on the used ring of a split ring is served again then.
        """
        if not self._interrupted:
            return self._checked(state)
        if self._packed:
            raise ProtocolError("ring-position", "a packed ring without an in-flight record")
        return RingState(avail=state.used, used=state.used)

    def _checked(self, state: RingState) -> RingState:
        """*state* from SET_VRING_BASE, if it is one of this ring; a record would overrule it."""
        beyond = state.avail >= self.num or state.used >= self.num
        if self._packed and beyond:
            raise ProtocolError("vring-base", f"{self.base} in a ring of {self.num}")
        return state

    def _begin_split(
        self, state: RingState, record: SplitInflight
    ) -> tuple[RingState, Resubmit | None]:
        self._log = record
        if record.valid:
            return record.recover(state.used)
        record.begin(state.used)
        return self._checked(state), None

    def _begin_packed(
        self, memory: GuestMemory, at: RingAddresses, state: RingState, record: PackedInflight
    ) -> tuple[RingState, Resubmit | None]:
        def flags_at(slot: int) -> int:
            size = packed_ring.PvirtqDesc.SIZE
            return packed_ring.PvirtqDesc.parse(memory.read(at.desc + size * slot, size)).flags

        self._log = record
        if record.valid:
            state, again = record.recover(flags_at)
            held = 0 if again.slots is None else int(again.slots.sum())
            self._hide_used(memory, at.desc, state, held)
            return state, again
        self._checked(state)
        record.begin(state.used, state.used_wrap)
        return state, None

    def _hide_used(self, memory: GuestMemory, ring: int, state: RingState, held: int) -> None:
        """Make the slots of what is in flight look available to the driver.

        A batch is seen by its first used descriptor, which is written last.  If the back-end
        died before that, the others are there already, and the driver would find them after
        whatever is given next.
        """
        both = packed_ring.VIRTQ_DESC_F_AVAIL | packed_ring.VIRTQ_DESC_F_USED
        for position in range(state.used, state.used + held):
            turned = position >= self.num
            wrap = state.used_wrap ^ turned
            at = ring + packed_ring.PvirtqDesc.SIZE * (position - self.num * turned)
            raw = memory.read(at, packed_ring.PvirtqDesc.SIZE)
            flags = packed_ring.PvirtqDesc.parse(raw).flags
            shown = packed_ring.VIRTQ_DESC_F_AVAIL if wrap else packed_ring.VIRTQ_DESC_F_USED
            if flags & both != shown:
                memory.write(at + _FLAGS, (flags & ~both | shown).to_bytes(2, "little"))

    def base_state(self, *, packed: bool) -> RingState:
        """Return the state that SET_VRING_BASE set; without it, a ring starts at index 0."""
        if self.base is None:
            return RingState()
        return decode_base(self.base, packed=packed)

    def stop(self, record: RingRecord, *, packed: bool) -> int:
        """End this life of the ring, which stopped as *record* says; return the base to report."""
        if record.position is not None:
            self.base = encode_base(record.position, packed=packed)
        self.recovered -= self._unclaimed(record)
        if self._log is not None and not self._log.in_flight:
            self._log.end()
        self._forget()
        return encode_base(self.base_state(packed=packed), packed=packed)

    def reset(self) -> None:
        """Return to the state before the driver set the ring up; descriptors for events stay."""
        self._forget()
        self.base = None
        self.enabled = False

    def _forget(self) -> None:
        self.started = self.busy = self.resumed = False
        self._restored = self._interrupted = False
        self._log = None

    # -- state --------------------------------------------------------------------------------

    def state(self, slots: Slots, record: RingRecord, *, ran: bool) -> VringState:
        """Return the ring as a value; its descriptors get *slots*."""
        addr = self.addr
        return VringState(
            num=self.num,
            addr=(addr.flags, addr.descriptor, addr.used, addr.available, addr.log)
            if addr is not None
            else None,
            base=self.base,
            started=self.started,
            enabled=self.enabled,
            kick=slots.slot(self._key("kick"), self.kick),
            call=slots.slot(self._key("call"), self.call),
            err=slots.slot(self._key("err"), self.err),
            recovered=self.recovered,
            ran=ran,
            record=record,
        )

    def restore(self, state: VringState, fds: Mapping[str, int | None], slots: Slots) -> None:
        """Continue from *state*, which has been checked, with *fds*, which are taken over."""
        for name, fd in fds.items():
            self.set_fd(name, fd)
            slots.keep(self._key(name), getattr(state, name))
        self.num, self.base, self.addr = state.num, state.base, state.vring_addr(self.index)
        self.started, self.enabled = state.started, state.enabled
        self.recovered = state.recovered
        self._restored, self._interrupted = state.started, state.ran

    def _key(self, name: str) -> tuple[str, int, int]:
        """Return what identifies the descriptor *name* of this ring in this process."""
        return name, self.index, self._keys[name]

    @property
    def is_initial(self) -> bool:
        """Whether the ring begins as a driver that has just set it up makes it."""
        return self.base in (None, 0, 0x8000, 0x80008000) and not self.resumed
