# SPDX-License-Identifier: Apache-2.0
"""Device state through a descriptor ("Migrating back-end state", vhost-user.rst, QEMU 11.1.3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vballoon.errors import PeerError, ProtocolError
from vballoon.vhost_user.session import LATER, Handler, Reply, u64
from virtio_formats.vhost_user import (
    Request,
    StateDirection,
    StatePhase,
    VhostUserTransferDeviceState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.vhost_user.io import Handle, Io
    from vballoon.vhost_user.rings import FrontendRings
    from vballoon.vhost_user.session import Fds, _Later
    from vballoon.virtio import VirtioDevice

__all__ = ("MAX_STATE", "NO_FD", "StateTransfer")

log = logging.getLogger(__name__)

MAX_STATE = 64 << 20
"""Bytes of state that a front-end can make us read.  A balloon's is some kilobytes, and at worst
16 bytes for every second page: this covers the worst case of a guest of 32 GiB."""

NO_FD = 1 << 8
"""SET_DEVICE_STATE_FD's answer, bit 8: the front-end's own channel is used."""


class StateTransfer:
    """At most one transfer at a time; CHECK_DEVICE_STATE asks for its outcome.

    *finish* sends the answer to a CHECK_DEVICE_STATE that is waiting, if there is one.
    """

    def __init__(
        self,
        device: VirtioDevice,
        io: Io,
        rings: FrontendRings,
        finish: Callable[[Reply], None],
    ) -> None:
        self._device, self._io, self._rings, self._finish = device, io, rings, finish
        self._handle: Handle | None = None
        self._outcome: str | None = "no state was transferred"

    def handlers(self) -> dict[Request, Handler]:
        """Return the handlers by request."""
        return {
            Request.SET_DEVICE_STATE_FD: self.begin,
            Request.CHECK_DEVICE_STATE: lambda _message, _fds: self.check(),
        }

    def begin(self, message: VhostUserTransferDeviceState, fds: Fds) -> Reply:
        """SET_DEVICE_STATE_FD: start to save or to load over the descriptor."""
        if message.phase != StatePhase.STOPPED:
            raise ProtocolError("state-phase", f"{message.phase}")
        if not self._rings.suspended:
            raise ProtocolError("state-running", "a ring is started")
        self.cancel("another transfer was started")
        if message.direction == StateDirection.SAVE:
            state = self._device.save()
            self._outcome = None
            self._handle = self._io.write_all(fds.take(), state, self._finished)
        elif message.direction == StateDirection.LOAD:
            self._outcome = None
            self._handle = self._io.read_all(fds.take(), MAX_STATE, self._load)
        else:
            raise ProtocolError("state-direction", f"{message.direction}")
        return u64(NO_FD)

    @property
    def succeeded(self) -> bool:
        """Whether the last transfer has succeeded."""
        return self._outcome == ""

    @succeeded.setter
    def succeeded(self, value: bool) -> None:
        self._outcome = "" if value else "the process that made it has ended"

    def check(self) -> Reply | _Later:
        """CHECK_DEVICE_STATE: return the outcome, once it is known."""
        return LATER if self._outcome is None else self._answer()

    def cancel(self, reason: str) -> None:
        """Cancel a transfer that is running; it has failed then."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.cancel()
            self._finished(reason)

    def _answer(self) -> Reply:
        return u64(1 if self._outcome else 0)

    def _load(self, state: bytes, trouble: str) -> None:
        if not trouble:
            try:
                self._device.load(state)
                # The guest that starts the rings next is not at its beginning: no reset is due.
                self._rings.standstill = False
            except PeerError as error:
                trouble = str(error)
        self._finished(trouble)

    def _finished(self, trouble: str) -> None:
        self._handle, self._outcome = None, trouble
        if trouble:
            log.warning("device state: %s", trouble)
        self._finish(self._answer())
