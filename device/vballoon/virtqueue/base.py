# SPDX-License-Identifier: Apache-2.0
"""The interface of every virtqueue engine: take a batch of buffers, give a batch back.

Four engines (split and packed, scalar and batch) implement :class:`Virtqueue`.  A *buffer* is one
descriptor chain.  A batch of buffers is a :class:`ChainBatch` of NumPy columns, so that a device
handles a thousand buffers with a dozen array operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory

__all__ = ("ChainBatch", "Engine", "RingAddresses", "RingState", "Virtqueue")


Engine = Literal["batch", "numpy", "scalar"]
"""The engine that serves a ring: batches (compiled if available, or in NumPy only), or one
descriptor at a time."""


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Guest-physical addresses of the three areas of a virtqueue (virtio: *Virtqueues*).

    Split: descriptor table, available ring, used ring.  Packed: descriptor ring, driver event
    suppression, device event suppression.
    """

    desc: int
    driver: int
    device: int


@dataclass(frozen=True, slots=True)
class RingState:
    """The position of a stopped ring, from which it can continue.

    *avail* is the next available index to take (split: the free-running 16-bit index; packed: the
    slot, 15 bits), *used* the next used index to write.  Only packed rings use the wrap counters.
    """

    avail: int = 0
    used: int = 0
    avail_wrap: bool = True
    used_wrap: bool = True


@dataclass(frozen=True, slots=True)
class ChainBatch:
    """Descriptor chains taken from a ring, in the order the driver made them available.

    ``ids`` (uint16[n]) names each chain when it is given back: head index (split) or buffer id
    (packed).  Descriptor *j* of chain *i* is column ``first[i] + j`` of ``addr`` (uint64[m],
    guest-physical, bytes), ``len`` (uint32[m], bytes) and ``writable`` (bool[m], device-writable);
    ``first`` is intp[n + 1].  Every descriptor has been checked to lie in guest memory, and no
    readable descriptor follows a writable one.
    """

    ids: NDArray[np.uint16]
    first: NDArray[np.intp]
    addr: NDArray[np.uint64]
    len: NDArray[np.uint32]
    writable: NDArray[np.bool_]
    memory: GuestMemory

    def __len__(self) -> int:
        """Return the number of buffers."""
        return int(self.ids.size)

    def readable(self, i: int, limit: int) -> bytes:
        """Return the first *limit* device-readable bytes of buffer *i*, copied once.

        The limit is required because the guest chooses the length of a buffer.
        """
        parts: list[bytes] = []
        for j in range(int(self.first[i]), int(self.first[i + 1])):
            if self.writable[j] or limit <= 0:
                break
            parts.append(self.memory.read(int(self.addr[j]), min(int(self.len[j]), limit)))
            limit -= len(parts[-1])
        return b"".join(parts)

    def readable_size(self) -> NDArray[np.int64]:
        """Return the total of device-readable bytes of each buffer (int64[n])."""
        return self._sums(~self.writable)

    def writable_size(self) -> NDArray[np.int64]:
        """Return the total of device-writable bytes of each buffer (int64[n])."""
        return self._sums(self.writable)

    def write(self, i: int, data: bytes) -> int:
        """Write *data* to the device-writable part of buffer *i* and return the bytes written."""
        done = 0
        for j in range(int(self.first[i]), int(self.first[i + 1])):
            if self.writable[j] and done < len(data):
                part = data[done : done + int(self.len[j])]
                self.memory.write(int(self.addr[j]), part)
                done += len(part)
        return done

    def _sums(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        sizes = np.zeros(self.addr.size + 1, dtype=np.int64)
        np.cumsum(np.where(which, self.len, 0), out=sizes[1:])
        return sizes[self.first[1:]] - sizes[self.first[:-1]]


class Virtqueue(ABC):
    """The device side of one virtqueue.  It is not thread-safe and has one owner."""

    size: int
    """Queue size, in descriptors."""

    @property
    def memory_lost(self) -> bool:
        """Whether an access to the guest memory of this queue has failed."""
        return False

    @abstractmethod
    def take(self, limit: int | None = None) -> ChainBatch:
        """Return the buffers that the driver has made available, at most *limit*.

        Return the well-formed chains before the first malformed one.  If the first chain is
        malformed, raise :class:`~vballoon.errors.QueueError` with the rule that it breaks, and
        leave the position of the ring unchanged.  An empty batch means that no buffer is available.

        Call this until the batch is empty.  Only then is the driver asked to notify of the next
        buffer (unless kicks are disabled); a buffer that arrived in between is returned instead.
        A batch ends early if it has very many descriptors.
        """

    @abstractmethod
    def give(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        """Put buffers on the used ring: all elements first, one index (or first flag) last.

        *written* (uint32) is the number of bytes written to each buffer.  If a dirty log is
        active, mark the pages of the ring.  Raise :class:`~vballoon.errors.UsageError` for an id
        that is not outstanding.
        """

    @abstractmethod
    def should_notify(self) -> bool:
        """Return whether the driver wants a notification of buffers given since the last call.

        The full fence between storing the used index and loading the driver's event
        suppression is in this call (virtio: *Used Buffer Notification Suppression*).
        """

    @abstractmethod
    def disable_kicks(self) -> None:
        """Ask the driver not to notify: the ring is being polled."""

    @abstractmethod
    def enable_kicks(self) -> bool:
        """Ask for notifications; return True if buffers arrived in between (take them now).

        The full fence between storing the event index and loading the available index is
        in this call.
        """

    @abstractmethod
    def state(self) -> RingState:
        """Return the position of the ring: the next buffer to take and the next used slot."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Number of buffers taken and not yet given back."""


def empty_batch(memory: GuestMemory) -> ChainBatch:
    """Return a batch without buffers."""
    columns: dict[str, Any] = {
        "ids": np.empty(0, np.uint16),
        "first": np.zeros(1, np.intp),
        "addr": np.empty(0, np.uint64),
        "len": np.empty(0, np.uint32),
        "writable": np.empty(0, np.bool_),
    }
    return ChainBatch(memory=memory, **columns)
