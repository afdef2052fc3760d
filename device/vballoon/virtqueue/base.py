# SPDX-License-Identifier: Apache-2.0
"""What every virtqueue engine is: take a batch of buffers, give a batch back.

Four engines (split and packed, scalar and batch) stand behind :class:`Virtqueue`.  A *buffer* is
one descriptor chain; a batch of them is a :class:`ChainBatch`, columns of NumPy arrays, so that a
device handles a thousand buffers with a dozen array operations.
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
"""How a ring is served: whole batches (compiled where that was built, or in NumPy alone), or step
by step and obviously right."""


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
    """Where a stopped ring stands; enough to go on later.

    *avail* is the next available index to take (split: the free-running 16-bit index; packed: the
    slot, 15 bits), *used* the next used index to write; the wrap counters matter to packed rings.
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
        """How many buffers."""
        return int(self.ids.size)

    def readable(self, i: int, limit: int) -> bytes:
        """The first *limit* device-readable bytes of buffer *i* (copied once, so read once).

        There is always a limit: the guest chooses how long a buffer is, the device how much of
        it is worth reading.
        """
        parts: list[bytes] = []
        for j in range(int(self.first[i]), int(self.first[i + 1])):
            if self.writable[j] or limit <= 0:
                break
            parts.append(self.memory.read(int(self.addr[j]), min(int(self.len[j]), limit)))
            limit -= len(parts[-1])
        return b"".join(parts)

    def readable_size(self) -> NDArray[np.int64]:
        """Total device-readable bytes of each buffer (int64[n])."""
        return self._sums(~self.writable)

    def writable_size(self) -> NDArray[np.int64]:
        """Total device-writable bytes of each buffer (int64[n])."""
        return self._sums(self.writable)

    def write(self, i: int, data: bytes) -> int:
        """Fill the device-writable bytes of buffer *i* from the start; returns bytes written."""
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
    """One virtqueue, device side.  Not thread-safe; one owner."""

    size: int
    """Queue size, in descriptors."""

    @abstractmethod
    def take(self, limit: int | None = None) -> ChainBatch:
        """The buffers that the driver has made available, at most *limit* of them.

        Returns the well-formed chains in front of the first malformed one; the call that finds a
        malformed chain first in line raises :class:`~vballoon.errors.QueueError` with the rule it
        breaks, and the ring is left where it was.  An empty batch means there is nothing to take.

        Take until the batch is empty: only then is the driver asked (unless kicks are disabled)
        to notify of the next buffer, and one that slipped in meanwhile is returned instead.  A
        batch of very many descriptors may be closed early.
        """

    @abstractmethod
    def give(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        """Put buffers on the used ring: all elements first, one index (or first flag) last.

        *written* (uint32, bytes) is how much of each buffer's device-writable part was written.
        Logs the ring's own pages where a dirty log is due.  Raises
        :class:`~vballoon.errors.UsageError` for an id that is not outstanding.
        """

    @abstractmethod
    def should_notify(self) -> bool:
        """Whether the driver wants a notification for what was given since the last call.

        Contains the full fence between storing the used index and loading the driver's event
        suppression (virtio: *Used Buffer Notification Suppression*).
        """

    @abstractmethod
    def disable_kicks(self) -> None:
        """Ask the driver not to notify: the ring is being polled."""

    @abstractmethod
    def enable_kicks(self) -> bool:
        """Ask for notifications again; True when buffers slipped in meanwhile (take them now).

        Contains the full fence between storing the event index and loading the available index.
        """

    @abstractmethod
    def state(self) -> RingState:
        """Where the ring stands: the next buffer to take and the next used slot."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Buffers taken and not yet given back."""


def empty_batch(memory: GuestMemory) -> ChainBatch:
    """A batch of no buffers."""
    columns: dict[str, Any] = {
        "ids": np.empty(0, np.uint16),
        "first": np.zeros(1, np.intp),
        "addr": np.empty(0, np.uint64),
        "len": np.empty(0, np.uint32),
        "writable": np.empty(0, np.bool_),
    }
    return ChainBatch(memory=memory, **columns)
