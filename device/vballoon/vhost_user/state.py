# SPDX-License-Identifier: Apache-2.0
"""The state of a back-end as a plain value: all that a restarted process needs to continue.

Stock QEMU cannot lose its back-end, so another process must be able to take over a live
connection.  What the front-end has negotiated and set up is this value; the descriptors that it
handed over are kept beside it, under the slot numbers in it.  See
:mod:`~vballoon.vhost_user.packing` for its bytes.

Not in it: the device's own state (:meth:`~vballoon.virtio.VirtioDevice.save`), the position of
rings that run (guest memory and the in-flight area have it), and a transfer of device state that
is not finished (it fails).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vballoon.virtio import RingRecord
from virtio_formats.vhost_user import VhostUserMemoryRegion, VhostVringAddr

__all__ = ("AreaState", "BackendState", "RegionState", "VringState")


@dataclass(frozen=True, slots=True)
class RegionState:
    """A memory region: guest-physical, front-end and file addresses and size, in bytes."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int
    slot: int

    def describe(self) -> VhostUserMemoryRegion:
        """Return the description in which a front-end sends the region."""
        return VhostUserMemoryRegion(
            guest_address=self.guest_address,
            size=self.size,
            user_address=self.user_address,
            mmap_offset=self.mmap_offset,
        )


@dataclass(frozen=True, slots=True)
class AreaState:
    """Shared memory: the in-flight area, or (without queues) the dirty log."""

    slot: int
    size: int
    offset: int
    num_queues: int = 0
    queue_size: int = 0


@dataclass(frozen=True, slots=True)
class VringState:
    """One ring: what the front-end has said, and the slots of its event descriptors."""

    num: int = 0
    addr: tuple[int, int, int, int, int] | None = None
    """Flags, descriptor table, used ring, available ring, log address."""
    base: int | None = None
    started: bool = False
    enabled: bool = False
    kick: int = 0
    call: int = 0
    err: int = 0
    recovered: int = 0
    ran: bool = False
    """Whether the device used the ring, so that its position is in guest memory only."""
    record: RingRecord = field(default_factory=RingRecord)

    def vring_addr(self, index: int) -> VhostVringAddr | None:
        """Return the addresses as the message SET_VRING_ADDR of ring *index*."""
        if self.addr is None:
            return None
        flags, descriptor, used, available, log = self.addr
        return VhostVringAddr(
            index=index,
            flags=flags,
            descriptor=descriptor,
            used=used,
            available=available,
            log=log,
        )


@dataclass(frozen=True, slots=True)
class BackendState:
    """A back-end's connection."""

    acked: int = 0
    protocol_features: int = 0
    status: int = 0
    owned: bool = False
    features_ok: bool = True
    standstill: bool = True
    change_due: bool = False
    transferred: bool = False
    """Whether the last transfer of device state has succeeded."""
    own_area: bool = False
    """Whether the in-flight area is the back-end's own, not the front-end's."""
    config_changes: int = 0
    regions: tuple[RegionState, ...] = ()
    inflight: AreaState | None = None
    log: AreaState | None = None
    log_event: int = 0
    channel: int = 0
    vrings: tuple[VringState, ...] = ()
    counters: tuple[tuple[int, int], ...] = ()
    """Messages received: (request number, count); 0 counts refused messages."""
