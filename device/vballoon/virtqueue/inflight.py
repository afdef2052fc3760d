# SPDX-License-Identifier: Apache-2.0
"""What a record of the buffers in flight is told, and what it hands back after a crash.

vhost-user keeps such a record in memory that outlives the backend (label "Inflight I/O tracking"
in QEMU's docs/interop/vhost-user.rst).  The layout belongs to the transport; the ring only says
what happens and when.
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
    """Buffers that were in flight when an earlier backend died, oldest first.

    ``ids`` (uint16[n]) are heads (split) or buffer ids (packed).  A packed ring needs the
    descriptors too, for used ones may have been written over them: ``slots`` (uint16[n]) counts
    the ring slots of each buffer, and ``ring`` holds those descriptors, all buffers in a row
    (structured, the dtype of ``PvirtqDesc``).  Split rings ignore both.
    """

    ids: NDArray[np.uint16]
    slots: NDArray[np.uint16] | None = None
    ring: NDArray[Any] | None = None


class InflightLog(Protocol):
    """Told of every take and give, at the instants at which a crash would matter."""

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Buffers were taken, in this order; nobody has seen them yet.

        *slots* (uint16[n]) is how many ring slots each occupies (split: 1).  *ring* (structured,
        ``PvirtqDesc``) are a packed ring's descriptors of all of them in a row, else None.
        Not called for buffers that are resubmitted.
        """

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """The buffers are on the used ring; its index (or first flag) is not published yet."""

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """The index is published; *state* is where the ring stands now."""


class NullInflight:
    """No record is kept."""

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Forget it."""

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """Forget it."""

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """Forget it."""
