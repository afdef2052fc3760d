# SPDX-License-Identifier: Apache-2.0
"""A dirty log in shared memory, with guard bytes, as a front-end hands it to a back-end."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from virtio_conformance.memory import PAGE
from virtio_formats.vhost_user.payloads import VhostUserLog
from virtio_formats.vhost_user.requests import Request

if TYPE_CHECKING:
    from virtio_conformance.rig_vhost_user import VhostUserRig

__all__ = ("LOG_OFFSET", "LOG_SIZE", "Log")

LOG_OFFSET = 2 * PAGE
LOG_SIZE = (0x1_4020_0000 // PAGE) // 8 + 4096
"""Bytes of log: all memory of the suite's layout, and room for a ring logged elsewhere."""


class Log:
    """The dirty log: one bit a page, at an offset in its file, guard bytes around it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("conformance-log")
        os.ftruncate(self.fd, LOG_OFFSET + LOG_SIZE + PAGE)
        self.view = mmap.mmap(self.fd, LOG_OFFSET + LOG_SIZE + PAGE)

    def pages(self) -> set[int]:
        """Return the page numbers that are marked dirty."""
        raw = np.frombuffer(self.view[LOG_OFFSET : LOG_OFFSET + LOG_SIZE], np.uint8)
        bits = np.unpackbits(raw, bitorder="little")
        return {int(page) for page in np.flatnonzero(bits)}

    def clear(self) -> None:
        """Forget all marks."""
        self.view[:] = bytes(len(self.view))

    def strays(self) -> bool:
        """Return whether anything was written around the log."""
        return any(self.view[:LOG_OFFSET]) or any(self.view[LOG_OFFSET + LOG_SIZE :])

    def close(self) -> None:
        """Unmap and close."""
        self.view.close()
        os.close(self.fd)

    def attach(self, rig: VhostUserRig) -> None:
        """Send SET_LOG_BASE.  Its reply has 0, 8 or 16 bytes, depending on the back-end."""
        payload = VhostUserLog(mmap_size=LOG_SIZE, mmap_offset=LOG_OFFSET).build()
        rig.fe.send(Request.SET_LOG_BASE, payload, [self.fd])
        rig.fe.expect_reply(Request.SET_LOG_BASE)
