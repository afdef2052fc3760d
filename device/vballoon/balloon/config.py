# SPDX-License-Identifier: Apache-2.0
"""The device configuration space: what the driver reads, and the little that it may write."""

from __future__ import annotations

from vballoon.errors import ProtocolError
from virtio_formats.virtio.balloon import CONFIG_SIZE_STANDARD, BalloonConfig

__all__ = ("ConfigSpace",)


class ConfigSpace:
    """``struct virtio_balloon_config`` (*Memory Balloon Device / Device configuration layout*).

    *walk*: the space includes the two fields of the walk extension (24 bytes, else 16).
    """

    def __init__(self, *, walk: bool) -> None:
        self.fields = BalloonConfig()
        self.size = BalloonConfig.SIZE if walk else CONFIG_SIZE_STANDARD
        self._poison_locked = False

    def read(self) -> bytes:
        """Return the whole space, little-endian."""
        return self.fields.build()[: self.size]

    def write(self, offset: int, data: bytes) -> bool:
        """Apply a driver's write; returns whether ``actual`` changed.

        Front-ends echo the whole block back when the guest writes one field of it, so a write
        that covers read-only fields is no fault: those keep their values.  A write past the end
        raises :class:`~vballoon.errors.ProtocolError`.
        """
        if offset < 0 or offset + len(data) > self.size:
            raise ProtocolError("config-range", f"{len(data)} bytes at {offset} of {self.size}")
        image = bytearray(self.fields.build())
        image[offset : offset + len(data)] = data
        written = BalloonConfig.parse(image)
        changed = written.actual != self.fields.actual
        self.fields.actual = written.actual
        if not self._poison_locked:
            self.fields.poison_val = written.poison_val
        return changed

    def lock(self) -> None:
        """DRIVER_OK: from here on the driver must not modify ``poison_val`` (*Page Poison*)."""
        self._poison_locked = True

    def unlock(self) -> None:
        """Allow writes to ``poison_val`` again after the driver has stopped the device."""
        self._poison_locked = False

    def reset(self, *, keep_poison: bool = False) -> None:
        """Device reset: the operator's target stays, everything of the driver's goes.

        *keep_poison* is for a reset that comes to light only when the new driver starts, and that
        may be none (a guest that was paused before it used any ring): the ``poison_val`` that is
        there stays.  A driver that negotiates PAGE_POISON writes its own before it starts, and for
        any other the value means nothing; dropping it could have reported pages discarded that
        the guest expects to keep it.
        """
        poison = self.fields.poison_val if keep_poison else 0
        self.fields = BalloonConfig(num_pages=self.fields.num_pages, poison_val=poison)
        self._poison_locked = False
