# SPDX-License-Identifier: Apache-2.0
"""What the transport is doing, as plain data for whoever publishes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtio_formats.vhost_user import ProtocolFeature
from virtio_formats.virtio import features as f

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vballoon.vhost_user.backend import VhostUserBackend
    from vballoon.vhost_user.vring import Vring

__all__ = ("BackendStatus", "QueueStatus", "RegionStatus", "feature_names", "snapshot")


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One virtqueue; counters are buffers and notifications since the ring was started."""

    index: int
    state: str
    """``stopped``, ``disabled``, ``running`` or ``broken``."""
    size: int
    """Descriptors (0: the driver has not set it up)."""
    broken: str | None = None
    """The rule that the driver broke, if it did."""
    outstanding: int = 0
    taken: int = 0
    given: int = 0
    kicked: int = 0
    notified: int = 0
    recovered: int = 0
    """Buffers that were in flight when an earlier backend died, and were taken up again."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One region of guest memory, bytes."""

    guest_phys_addr: int
    size: int
    page_size: int


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """A snapshot of the vhost-user transport."""

    transport: str = "vhost-user"
    connected: bool = False
    features: list[str] = field(default_factory=list)
    protocol_features: list[str] = field(default_factory=list)
    queues: list[QueueStatus] = field(default_factory=list)
    regions: list[RegionStatus] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    """Messages by name, ``refused`` among them, and ``config_changes``; of all connections."""


def feature_names(word: int, device_names: Mapping[int, str] | None = None) -> list[str]:
    """The bits of *word* by name, lowest first; *device_names* names the device's own bits."""
    names = {getattr(f, name): name for name in f.__all__ if name.startswith("VIRTIO_F_")} | dict(
        device_names or {}
    )
    return [names.get(bit, f"bit {bit}") for bit in range(word.bit_length()) if word >> bit & 1]


def snapshot(
    backend: VhostUserBackend | None,
    counters: Mapping[str, int],
    device_names: Mapping[int, str] | None = None,
) -> BackendStatus:
    """The status of *backend* (None: no front-end is connected)."""
    if backend is None:
        return BackendStatus(counters=dict(counters))
    return BackendStatus(
        connected=True,
        features=feature_names(backend.features, device_names),
        protocol_features=[
            p.name or hex(p) for p in ProtocolFeature if p in backend.session.protocol_features
        ],
        queues=[_queue(backend, vring) for vring in backend.vrings],
        regions=[
            RegionStatus(r.guest_phys_addr, r.size, r.page_size) for r in backend.memory.regions
        ],
        counters=dict(counters),
    )


def _queue(backend: VhostUserBackend, vring: Vring) -> QueueStatus:
    state = "stopped"
    if vring.broken is not None:
        state = "broken"
    elif vring.index in backend.queues:
        state = "running"
    elif vring.started:
        state = "disabled"
    queue = vring.queue
    return QueueStatus(
        index=vring.index,
        state=state,
        size=vring.num,
        broken=vring.broken.rule if vring.broken else None,
        outstanding=queue.ring.outstanding if queue else 0,
        taken=queue.taken if queue else 0,
        given=queue.given if queue else 0,
        kicked=queue.kicked if queue else 0,
        notified=queue.notified if queue else 0,
        recovered=vring.recovered,
    )
