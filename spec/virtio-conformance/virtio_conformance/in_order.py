# SPDX-License-Identifier: Apache-2.0
"""Read a ring whose device uses buffers in order (IN_ORDER).

Such a device may return a batch of buffers by writing a used element for the last one only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from virtio_conformance.findings import Finding, Hang
from virtio_conformance.rig import Rig
from virtio_conformance.ring import DriverRing
from virtio_conformance.ring_packed import AVAIL, USED, PackedRing
from virtio_conformance.ring_split import SplitRing

__all__ = ("collect_in_order",)


def collect_in_order(rig: Rig, ring: DriverRing, ids: Sequence[int], limit: float = 2.0) -> None:
    """Wait until all *ids* are used, in this order; an element may return those before it too."""
    waiting = list(ids)
    deadline = time.monotonic() + limit
    while waiting:
        if isinstance(ring, SplitRing):
            seen = _split(ring, waiting)
        else:
            assert isinstance(ring, PackedRing)
            seen = _packed(ring, waiting)
        if not seen:
            if time.monotonic() > deadline:
                raise Hang(f"buffers {waiting} did not come back within {limit} s")
            rig.main_quiet(0.001)


def _split(ring: SplitRing, waiting: list[int]) -> bool:
    """Read the used elements of a batch, of which only the last one has to be written."""
    now = ring.used_idx
    count = (now - ring.last_used) & 0xFFFF
    if count > len(waiting):
        raise Finding(f"used index moves by {count}, outstanding are {len(waiting)}")
    if not count:
        return False
    last = int(ring.elements[(now - 1) % ring.size]["id"])
    if last != waiting[count - 1]:
        raise Finding(f"buffer {last} used where {waiting[count - 1]} is the last of the batch")
    for name in waiting[:count]:
        del ring.lengths[name]
        ring.free += reversed(ring.chains.pop(name))
    ring.last_used = now
    del waiting[:count]
    return True


def _packed(ring: PackedRing, waiting: list[int]) -> bool:
    """Read one used descriptor, which returns every buffer up to the one that it names."""
    flags = int(ring.desc["flags"][ring.used_slot])
    if not bool(flags & AVAIL) == bool(flags & USED) == bool(ring.used_wrap):
        return False
    name = int(ring.desc["id"][ring.used_slot])
    if name not in waiting:
        raise Finding(f"buffer {name} used, waiting are {waiting}")
    place = waiting.index(name)
    for done in waiting[: place + 1]:
        ring.used_slot += ring.lengths.pop(done)
        ring.ids.append(done)
    if ring.used_slot >= ring.size:
        ring.used_slot -= ring.size
        ring.used_wrap ^= 1
    del waiting[: place + 1]
    return True
