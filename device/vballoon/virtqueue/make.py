# SPDX-License-Identifier: Apache-2.0
"""Choose the engine that serves a ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vballoon.errors import MemoryFault, QueueError
from vballoon.native import native
from vballoon.virtqueue.base import RingState, Virtqueue
from vballoon.virtqueue.compiled import CompiledPacked, CompiledSplit
from vballoon.virtqueue.packed import ScalarPacked
from vballoon.virtqueue.packed_batch import BatchPacked
from vballoon.virtqueue.rules import MEMORY_LOST
from vballoon.virtqueue.split import ScalarSplit
from vballoon.virtqueue.split_batch import BatchSplit
from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed, split

if TYPE_CHECKING:
    from vballoon.memory import GuestMemory
    from vballoon.virtqueue.base import Engine, RingAddresses
    from vballoon.virtqueue.inflight import InflightLog, Resubmit

__all__ = ("make_virtqueue",)


def make_virtqueue(
    memory: GuestMemory,
    size: int,
    addresses: RingAddresses,
    features: int,
    state: RingState | None = None,
    *,
    engine: Engine = "batch",
    inflight: InflightLog | None = None,
    dirty_ring: int | None = None,
    resubmit: Resubmit | None = None,
) -> Virtqueue:
    """Return the virtqueue of *size* descriptors at *addresses* for the negotiated *features*.

    *engine*: ``batch`` is the fast one; without the compiled extension it is the same as
    ``numpy``.  The scalar engine always serves rings without a mapping.  *state* is the position
    where an earlier ring stopped (default: a new ring).  *inflight* records takes and gives.
    *dirty_ring* is the guest-physical address at which writes of the used ring are logged.
    *resubmit* has the buffers that were in flight before a crash; :meth:`Virtqueue.take` returns
    them first.  Pass an empty one after a crash without such buffers: the first notification is
    then always sent.

    Raise :class:`~vballoon.errors.QueueError` ``ring-size`` or ``ring-address``, and
    ``memory-lost`` for guest memory that the front-end has taken away.
    """
    if memory.lost:
        raise QueueError(MEMORY_LOST, "guest memory has pages that its file no longer has")
    state = state or RingState()
    if engine != "scalar" and not _is_mapped(memory, size, addresses, features):
        engine = "scalar"
    return _KINDS[engine, f.has(features, f.VIRTIO_F_RING_PACKED)](
        memory,
        size,
        addresses,
        features,
        state,
        inflight=inflight,
        dirty_ring=dirty_ring,
        resubmit=resubmit,
    )


_KINDS: dict[tuple[str, bool], type[ScalarSplit | ScalarPacked]] = {
    ("scalar", False): ScalarSplit,
    ("scalar", True): ScalarPacked,
    ("numpy", False): BatchSplit,
    ("numpy", True): BatchPacked,
    ("batch", False): CompiledSplit if native else BatchSplit,
    ("batch", True): CompiledPacked if native else BatchPacked,
}


def _is_mapped(memory: GuestMemory, size: int, addresses: RingAddresses, features: int) -> bool:
    """Return whether each area of the ring is in one mapping."""
    event = f.has(features, f.VIRTIO_F_EVENT_IDX)
    if f.has(features, f.VIRTIO_F_RING_PACKED):
        sizes = (packed.ring_size(size), *[packed.PvirtqEventSuppress.SIZE] * 2)
    else:
        sizes = (split.desc_size(size), split.avail_size(size, event), split.used_size(size, event))
    areas = (addresses.desc, addresses.driver, addresses.device)
    try:
        for addr, length in zip(areas, sizes, strict=True):
            memory.window(addr, length)
    except MemoryFault:
        return False
    return True
