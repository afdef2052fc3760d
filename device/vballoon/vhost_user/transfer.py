# SPDX-License-Identifier: Apache-2.0
"""Device state through a descriptor ("Migrating back-end state", vhost-user.rst, QEMU 11.1.3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vballoon.errors import PeerError, ProtocolError
from vballoon.vhost_user.session import LATER, Reply, u64
from virtio_formats.vhost_user import StateDirection, StatePhase, VhostUserTransferDeviceState

if TYPE_CHECKING:
    from vballoon.vhost_user.backend import VhostUserBackend
    from vballoon.vhost_user.io import Handle
    from vballoon.vhost_user.session import Fds, _Later

__all__ = ("MAX_STATE", "NO_FD", "StateTransfer")

log = logging.getLogger(__name__)

MAX_STATE = 64 << 20
"""Bytes of state that a front-end can make us read.  A balloon's is some kilobytes, and at worst
16 bytes for every second page: this is enough for a guest of 32 GiB that is in such a state."""

NO_FD = 1 << 8
"""SET_DEVICE_STATE_FD's answer, bit 8: the front-end's own channel is used."""


class StateTransfer:
    """At most one transfer at a time; its outcome is what CHECK_DEVICE_STATE asks for."""

    def __init__(self, backend: VhostUserBackend) -> None:
        self._backend = backend
        self._handle: Handle | None = None
        self._outcome: str | None = "no state was transferred"

    def begin(self, message: VhostUserTransferDeviceState, fds: Fds) -> Reply:
        """SET_DEVICE_STATE_FD: start to save or to load over the descriptor."""
        if message.phase != StatePhase.STOPPED:
            raise ProtocolError("state-phase", f"{message.phase}")
        if not self._backend.suspended:
            raise ProtocolError("state-running", "a ring is started")
        self.cancel("another transfer was started")
        if message.direction == StateDirection.SAVE:
            state = self._backend.device.save()
            self._outcome = None
            self._handle = self._backend.io.write_all(fds.take(), state, self._finished)
        elif message.direction == StateDirection.LOAD:
            self._outcome = None
            self._handle = self._backend.io.read_all(fds.take(), MAX_STATE, self._load)
        else:
            raise ProtocolError("state-direction", f"{message.direction}")
        return u64(NO_FD)

    def check(self) -> Reply | _Later:
        """CHECK_DEVICE_STATE: the outcome, once it is known."""
        return LATER if self._outcome is None else self._answer()

    def cancel(self, reason: str) -> None:
        """Call off a transfer under way; it has failed then."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.cancel()
            self._finished(reason)

    def _answer(self) -> Reply:
        return u64(1 if self._outcome else 0)

    def _load(self, state: bytes, trouble: str) -> None:
        if not trouble:
            try:
                self._backend.device.load(state)
                self._backend.goes_on()
            except PeerError as error:
                trouble = str(error)
        self._finished(trouble)

    def _finished(self, trouble: str) -> None:
        self._handle, self._outcome = None, trouble
        if trouble:
            log.warning("device state: %s", trouble)
        if self._backend.session.waiting:
            self._backend.session.finish(self._answer())
            self._backend.io.output()
