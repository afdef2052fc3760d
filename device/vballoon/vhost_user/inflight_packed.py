# SPDX-License-Identifier: Apache-2.0
"""The in-flight record of a packed virtqueue ("Inflight I/O tracking", vhost-user.rst, 11.1.3).

A packed ring's used descriptors are written over available ones, so the record keeps copies of the
descriptors.  Entries form a free list; its old and its new head, and the old and new used index,
say whether the last give was completed.  The list lives in the shared record (for whoever comes
after us) and, for speed, as a stack of entry numbers here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import ProtocolError, UsageError
from vballoon.vhost_user.inflight import InflightRecord
from vballoon.virtqueue import Resubmit, RingState
from virtio_formats.vhost_user import REGION_VERSION, DescStatePacked, QueueRegionPacked
from virtio_formats.virtio import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ("PackedInflight",)


class PackedInflight(InflightRecord):
    """Told of every take and give (:class:`~vballoon.virtqueue.InflightLog`)."""

    def __init__(self, region: NDArray[np.uint8], queue_size: int) -> None:
        super().__init__(region, QueueRegionPacked.dtype(), DescStatePacked.dtype(), queue_size)
        self._counter = 0
        self._free: list[int] = []  # the free list as a stack, its head last
        self._entries: dict[int, list[int]] = {}  # buffer id -> its entries, in order

    def begin(self, used: int, wrap: bool) -> None:
        """Start an empty record; *used* and *wrap* are the position of the ring's used side."""
        self._head["version"] = 0
        self._desc["inflight"] = 0
        self._desc["next"] = np.arange(1, self._size + 1)
        self._counter = 0
        self._free = list(range(self._size - 1, -1, -1))
        self._entries.clear()
        for name, value in (
            ("features", 0),
            ("desc_num", self._size),
            ("free_head", 0),
            ("old_free_head", 0),
            ("used_idx", used),
            ("old_used_idx", used),
            ("used_wrap_counter", wrap),
            ("old_used_wrap_counter", wrap),
            ("version", REGION_VERSION),  # last: from here on the record counts
        ):
            self._head[name] = value

    # -- recovery -----------------------------------------------------------------------------

    def recover(self, flags_at: Callable[[int], int]) -> tuple[RingState, Resubmit]:
        """Return the position of the ring, and what was in flight.

        *flags_at* reads the flags of a slot of the descriptor ring.  Raises
        :class:`~vballoon.errors.ProtocolError` ``inflight-region`` for a record that cannot be
        one of this ring.
        """
        self._check_head()
        self._settle_last_batch(flags_at)
        self._read_free_list()
        heads = np.flatnonzero(self._desc["inflight"])
        heads = heads[np.argsort(self._desc["counter"][heads], kind="stable")]
        chains = [self._chain(int(head)) for head in heads]
        again = self._resubmit(chains)
        self._counter = int(self._desc["counter"][heads].max()) + 1 if heads.size else 0
        used, wrap = self._get("used_idx"), bool(self._get("used_wrap_counter"))
        avail = used + sum(map(len, chains))
        turned = avail >= self._size
        state = RingState(
            avail=avail - self._size if turned else avail,
            used=used,
            avail_wrap=wrap ^ turned,
            used_wrap=wrap,
        )
        return state, again

    def _check_head(self) -> None:
        if self._get("version") != REGION_VERSION or self._get("desc_num") != self._size:
            raise ProtocolError(
                "inflight-region",
                f"version {self._get('version')}, {self._get('desc_num')} descriptors",
            )
        if max(self._get("used_idx"), self._get("old_used_idx")) >= self._size:
            raise ProtocolError("inflight-region", "used index out of range")

    def _settle_last_batch(self, flags_at: Callable[[int], int]) -> None:
        """Commit the last give if the driver can see it, else roll it back."""
        old, wrap = self._get("old_used_idx"), bool(self._get("old_used_wrap_counter"))
        if (self._get("used_idx"), bool(self._get("used_wrap_counter"))) != (old, wrap):
            both = packed.VIRTQ_DESC_F_AVAIL | packed.VIRTQ_DESC_F_USED
            available = packed.VIRTQ_DESC_F_AVAIL if wrap else packed.VIRTQ_DESC_F_USED
            if flags_at(old) & both != available:
                self._commit()
        for name in ("free_head", "used_idx", "used_wrap_counter"):
            self._head[name] = self._get(f"old_{name}")

    def _read_free_list(self) -> None:
        """Follow the free list; what is on it is not in flight."""
        order: list[int] = []
        seen: set[int] = set()
        at = self._get("free_head")
        while at < self._size:
            if at in seen:
                raise ProtocolError("inflight-region", f"free list loops at {at}")
            seen.add(at)
            order.append(at)
            at = int(self._desc["next"][at])
        self._desc["inflight"][order] = 0
        self._free = order[::-1]

    def _chain(self, head: int) -> list[int]:
        """Return the entries of the buffer that begins at *head*."""
        count = int(self._desc["num"][head])
        if not 0 < count <= self._size:
            raise ProtocolError("inflight-region", f"entry {head} has {count} descriptors")
        chain = [head]
        for _ in range(count - 1):
            at = int(self._desc["next"][chain[-1]])
            if at >= self._size:
                raise ProtocolError("inflight-region", f"entry {chain[-1]} leads to {at}")
            chain.append(at)
        return chain

    def _resubmit(self, chains: list[list[int]]) -> Resubmit:
        entries = [at for chain in chains for at in chain]
        if len(set(entries) | set(self._free)) != len(entries) + len(self._free):
            raise ProtocolError("inflight-region", "an entry is in two lists")
        ring = np.zeros(len(entries), packed.PvirtqDesc.dtype())
        for name in ("addr", "len", "id", "flags"):
            ring[name] = self._desc[name][entries]
        ids = [int(self._desc["id"][chain[-1]]) for chain in chains]
        self._entries = dict(zip(ids, chains, strict=True))
        if len(self._entries) != len(chains):
            raise ProtocolError("inflight-region", "a buffer id is in flight twice")
        slots = np.array([len(chain) for chain in chains], np.uint16)
        return Resubmit(np.array(ids, np.uint16), slots, ring)

    # -- InflightLog --------------------------------------------------------------------------

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Buffers were taken: copies of their descriptors first, the list's heads last."""
        if ring is None or ring.size > len(self._free):
            raise UsageError("a packed ring's descriptors are wanted, and room for them")
        count = int(ring.size)
        entries = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for name in ("addr", "len", "flags", "id"):
            self._desc[name][entries] = ring[name]
        first = np.zeros(ids.size + 1, np.intp)
        np.cumsum(slots, out=first[1:])
        taken = np.array(entries, np.intp)
        heads = taken[first[:-1]]
        self._desc["num"][heads] = slots
        self._desc["last"][heads] = taken[first[1:] - 1]
        self._desc["counter"][heads] = np.arange(
            self._counter, self._counter + ids.size, dtype=np.uint64
        )
        self._counter += int(ids.size)
        self._desc["inflight"][heads] = 1
        for ident, begin, end in zip(ids.tolist(), first[:-1], first[1:], strict=True):
            self._entries[ident] = entries[begin:end]
        self._head["free_head"] = self._top()
        self._head["old_free_head"] = self._top()

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """Put the entries back on the free list and move the used index on."""
        used = self._get("used_idx")
        wrap = bool(self._get("used_wrap_counter"))
        for ident in ids.tolist():
            chain = self._entries[ident]
            self._desc["next"][chain[-1]] = self._top()
            self._free.extend(reversed(chain))
            used += len(chain)
        self._head["free_head"] = self._top()
        if used >= self._size:
            used, wrap = used - self._size, not wrap
        self._head["used_wrap_counter"] = wrap
        self._head["used_idx"] = used

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """Remove the published batch from the record."""
        heads = [self._entries.pop(ident)[0] for ident in ids.tolist()]
        self._desc["inflight"][heads] = 0
        self._commit()
        if (state.used, state.used_wrap) != (
            self._get("used_idx"),
            bool(self._get("used_wrap_counter")),
        ):
            raise UsageError("the ring and its in-flight record disagree on the used index")

    def _commit(self) -> None:
        for name in ("free_head", "used_idx", "used_wrap_counter"):
            self._head[f"old_{name}"] = self._get(name)

    def _top(self) -> int:
        return self._free[-1] if self._free else self._size

    def _get(self, name: str) -> int:
        return int(self._head[name][0])
