# SPDX-License-Identifier: Apache-2.0
"""The device configuration space: what the driver reads, and the little that it may write."""

from __future__ import annotations

from dataclasses import replace

from vballoon.errors import ProtocolError
from vballoon_spec.virtio.balloon import CONFIG_SIZE_STANDARD, BalloonConfig

__all__ = ("ConfigSpace",)


class ConfigSpace:
    """``struct virtio_balloon_config`` (*Memory Balloon Device / Device configuration layout*).

    *walk* tells whether the two fields of the walk extension are there (24 bytes, else 16).
    """

    def __init__(self, *, walk: bool) -> None:
        self.fields = BalloonConfig()
        self.size = BalloonConfig.SIZE if walk else CONFIG_SIZE_STANDARD
        self.poison_locked = False
        """Set at DRIVER_OK: from there on the driver must not modify ``poison_val``."""

    def read(self) -> bytes:
        """The whole space, little-endian."""
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
        if not self.poison_locked:
            self.fields.poison_val = written.poison_val
        return changed

    def reset(self) -> None:
        """Device reset: the operator's target stays, everything of the driver's goes."""
        self.fields = replace(BalloonConfig(), num_pages=self.fields.num_pages)
        self.poison_locked = False
