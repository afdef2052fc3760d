# SPDX-License-Identifier: Apache-2.0
"""The record of buffers in flight that outlives this process.

"Inflight I/O tracking" of vhost-user.rst (QEMU 11.1.3) gives the layout and the order of the
steps.  The record is shared memory that the front-end keeps: when the back-end dies, the next one
gets it back and finds which buffers were taken and not given back.

Every step below is a plain store, in program order; a process that is killed between two of them
leaves exactly the stores before.  The order is what makes each state in between readable: a
buffer is "in flight" before the device gets it, and stops being so only after the driver can see
it used.  A crash in the middle of giving is settled by the ring itself: either its index (split)
or its first flags (packed) were written, or they were not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.native import guard
from vballoon.vhost_user.slots import Slots
from vballoon.vhost_user.state import AreaState
from virtio_formats.vhost_user import VhostUserInflight, queue_region_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("InflightArea", "InflightRecord")


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""An area that this back-end made keeps its size, whoever holds its descriptor."""


class InflightArea:
    """The shared buffer of all queues' regions; the descriptor is owned.

    ``num_queues`` and ``queue_size`` (descriptors) are what the front-end asked for.
    """

    def __init__(self, fd: int, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        """Take *fd* over; raises :class:`~vballoon.errors.ProtocolError` ``inflight-area``."""
        self.fd = fd
        self.size, self.offset = size, offset
        self.num_queues, self.queue_size = num_queues, queue_size
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            file_size = os.fstat(fd).st_size
            if not size or offset + size > file_size:
                raise ProtocolError("inflight-area", f"{offset:#x}+{size:#x} of {file_size:#x}")
            mapping = mmap.mmap(fd, offset + size - start, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            raise ProtocolError("inflight-area", str(error)) from None
        except ProtocolError:
            self.close()
            raise
        self._bytes = np.frombuffer(mapping, np.uint8, count=size, offset=offset - start)
        guard.watch(self._bytes)

    @classmethod
    def create(cls, num_queues: int, queue_size: int) -> InflightArea:
        """Create a zeroed area, large enough for either kind of ring (GET_INFLIGHT_FD)."""
        largest = max(queue_region_size(queue_size, packed=p) for p in (False, True))
        size = num_queues * largest
        fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, size, 0, num_queues, queue_size)

    def describe(self) -> VhostUserInflight:
        """Return the inflight description of this area."""
        return VhostUserInflight(
            mmap_size=self.size,
            mmap_offset=self.offset,
            num_queues=self.num_queues,
            queue_size=self.queue_size,
        )

    def state(self, slots: Slots) -> AreaState:
        """Return the area as a value; its descriptor gets one of *slots*."""
        return AreaState(
            slot=slots.slot(self, self.fd),
            size=self.size,
            offset=self.offset,
            num_queues=self.num_queues,
            queue_size=self.queue_size,
        )

    def share(self) -> int:
        """Another descriptor of the area, the caller's."""
        return os.dup(self.fd)

    def region(self, index: int, *, packed: bool) -> NDArray[np.uint8] | None:
        """Return the bytes of queue *index*'s region, or None if the area has none for it.

        Raises :class:`~vballoon.errors.ProtocolError` when the area is too small for its queues.
        """
        stride = queue_region_size(self.queue_size, packed=packed)
        if self.num_queues * stride > self.size:
            raise ProtocolError("inflight-area", f"{self.size} bytes, {self.num_queues}x{stride}")
        if index >= self.num_queues:
            return None
        return self._bytes[index * stride : (index + 1) * stride]

    def close(self) -> None:
        """Close the descriptor (the mapping lasts as long as a ring uses it)."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                pass  # not an open descriptor; there is nothing to undo


class InflightRecord:
    """One queue's region: its head, and a state for each of its *count* descriptors."""

    def __init__(
        self, region: NDArray[np.uint8], head: np.dtype[Any], state: np.dtype[Any], count: int
    ) -> None:
        if region.size < head.itemsize + count * state.itemsize:
            raise ProtocolError("inflight-region", f"{region.size} bytes for {count} descriptors")
        states = region[head.itemsize : head.itemsize + count * state.itemsize]
        self._head: NDArray[Any] = region[: head.itemsize].view(head)
        self._desc: NDArray[Any] = states.view(state)
        self._size = count

    def end(self) -> None:
        """Record an orderly stop of the ring: nothing is in flight or to be recovered."""
        self._head["version"] = 0

    @property
    def valid(self) -> bool:
        """Whether an earlier back-end left a record here."""
        return bool(self._head["version"][0])

    @property
    def in_flight(self) -> int:
        """Buffers that the record says were taken and not given back."""
        return int(np.count_nonzero(self._desc["inflight"]))
