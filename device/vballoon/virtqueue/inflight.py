# SPDX-License-Identifier: Apache-2.0
"""The interface of a record of buffers in flight, and of the buffers recovered from it.

vhost-user keeps such a record in memory that outlives the back-end (label "Inflight I/O tracking"
in QEMU's docs/interop/vhost-user.rst).  The layout belongs to the transport; the ring reports the
events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vballoon.virtqueue.base import RingState

__all__ = ("InflightLog", "NullInflight", "Resubmit")


@dataclass(frozen=True, slots=True)
class Resubmit:
    """Buffers that were in flight when an earlier back-end died, oldest first.

    ``ids`` (uint16[n]) are heads (split) or buffer ids (packed).  A packed ring also
    needs the descriptors, because used ones may have overwritten them: ``slots`` (uint16[n]) counts
    the ring slots of each buffer, and ``ring`` holds those descriptors, all buffers in a row
    (structured, the dtype of ``PvirtqDesc``).  Split rings ignore both.
    """

    ids: NDArray[np.uint16]
    slots: NDArray[np.uint16] | None = None
    ring: NDArray[Any] | None = None


class InflightLog(Protocol):
    """A record that is called at every take and give, at the points where a crash matters."""

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Record buffers that were taken, in this order, before the device gets them.

        *slots* (uint16[n]) is the number of ring slots of each (split: 1).  *ring* (structured,
        ``PvirtqDesc``) has all their descriptors in a row for packed rings, else it is None.
        It is not called for buffers that are resubmitted.
        """

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """Record buffers on the used ring whose index (or first flag) is not yet published."""

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """Record that the index is published; *state* is the new position of the ring."""


class NullInflight:
    """A record that keeps nothing."""

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Do nothing."""

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """Do nothing."""

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """Do nothing."""
