# SPDX-License-Identifier: Apache-2.0
"""The status of a transport as plain data, for the control socket."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtio_formats.virtio import features as f

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vballoon.memory import GuestMemory

__all__ = ("QueueStatus", "RegionStatus", "TransportStatus", "feature_names", "region_statuses")


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One virtqueue; counters are buffers and notifications since the ring was started."""

    index: int
    state: str
    """``stopped``, ``disabled``, ``running`` or ``broken``."""
    size: int
    """Descriptors (0: the driver has not set the queue up)."""
    broken: str | None = None
    """The rule that the driver broke, if it broke one."""
    outstanding: int = 0
    taken: int = 0
    given: int = 0
    kicked: int = 0
    notified: int = 0
    recovered: int = 0
    """Buffers that were in flight when an earlier back-end died, and were taken again."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One region of guest memory, in bytes."""

    guest_phys_addr: int
    size: int
    page_size: int


@dataclass(frozen=True, slots=True)
class TransportStatus:
    """A snapshot of a transport."""

    transport: str = "vhost-user"
    connected: bool = False
    features: list[str] = field(default_factory=list)
    protocol_features: list[str] = field(default_factory=list)
    """vhost-user only."""
    queues: list[QueueStatus] = field(default_factory=list)
    regions: list[RegionStatus] = field(default_factory=list)
    peer_pid: int = 0
    """vhost-user only: the process that has connected; 0 if it is unknown."""
    front_end_queues: int = 0
    """vhost-user only: queues for which the front-end has sent event descriptors."""
    memory_unmapped: bool = False
    """vfio-user only: the client has unmapped all the memory that it had mapped."""
    counters: dict[str, int] = field(default_factory=dict)
    """vhost-user only: messages of all connections by name, ``refused`` and ``config_changes``."""


def feature_names(word: int, device_names: Mapping[int, str] | None = None) -> list[str]:
    """Return the names of the bits of *word*, lowest first.

    *device_names* names the bits of the device (bit number to name).
    """
    names = {getattr(f, name): name for name in f.__all__ if name.startswith("VIRTIO_F_")} | dict(
        device_names or {}
    )
    return [names.get(bit, f"bit {bit}") for bit in range(word.bit_length()) if word >> bit & 1]


def region_statuses(memory: GuestMemory) -> list[RegionStatus]:
    """Return the regions of *memory*, as a status shows them."""
    return [RegionStatus(r.guest_phys_addr, r.size, r.page_size) for r in memory.regions]
