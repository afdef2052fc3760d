# SPDX-License-Identifier: Apache-2.0
"""The migration state machine and its data stream.

vfio-user specification (QEMU 11.1), ``VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE``.  A device takes
few arcs itself; any other transition is walked along them.  ``NEXT_HOP`` gives for each pair of
states the next state on that walk; a pair that is not in the table is refused, and the state
stays as it was.

Theory of operation: the device runs in RUNNING and PRE_COPY and stands still in the others.
STOP_COPY reads its state out, RESUMING takes a new one in; the arc from RESUMING to STOP hands
the whole of it to the device, which may refuse.  ERROR is left by a device reset only.  The state
survives the client: the next one finds it.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Iterable, Iterator
from typing import Protocol

from vfio_user.errors import RequestError
from vfio_user.state import MigrationState, require
from vfio_user.steps import Steps, awaited, finish
from virtio_formats.vfio_user import DeviceState

__all__ = ("MAX_STATE_SIZE", "NEXT_HOP", "Migratable", "MigrationMachine")

_STOP, _RUNNING = DeviceState.STOP, DeviceState.RUNNING
_STOP_COPY, _RESUMING = DeviceState.STOP_COPY, DeviceState.RESUMING
_PRE_COPY = DeviceState.PRE_COPY

NEXT_HOP: dict[tuple[DeviceState, DeviceState], DeviceState] = {
    (_STOP, _RUNNING): _RUNNING,
    (_STOP, _STOP_COPY): _STOP_COPY,
    (_STOP, _RESUMING): _RESUMING,
    (_STOP, _PRE_COPY): _RUNNING,
    (_RUNNING, _STOP): _STOP,
    (_RUNNING, _STOP_COPY): _STOP,
    (_RUNNING, _RESUMING): _STOP,
    (_RUNNING, _PRE_COPY): _PRE_COPY,
    (_STOP_COPY, _STOP): _STOP,
    (_STOP_COPY, _RUNNING): _STOP,
    (_STOP_COPY, _RESUMING): _STOP,
    (_RESUMING, _STOP): _STOP,
    (_RESUMING, _RUNNING): _STOP,
    (_RESUMING, _STOP_COPY): _STOP,
    (_RESUMING, _PRE_COPY): _STOP,
    (_PRE_COPY, _RUNNING): _RUNNING,
    (_PRE_COPY, _STOP_COPY): _STOP_COPY,
    (_PRE_COPY, _STOP): _RUNNING,
    (_PRE_COPY, _RESUMING): _RUNNING,
}
"""Current state and target: the next state.  STOP_COPY to PRE_COPY is explicitly not allowed."""

_SAVING = (_STOP_COPY, _PRE_COPY)
_ACTIVE = (_RUNNING, _PRE_COPY)

_STATES = {DeviceState.ERROR, *(state for pair in NEXT_HOP for state in pair)}

MAX_STATE_SIZE = 64 << 20
"""Bytes of state that a client can make the server hold; a device's own state is a few KiB."""


class Migratable(Protocol):
    """The part of a device that the machine calls."""

    def save_running(self) -> bytes:
        """Return more state while the device runs; empty if there is none now."""

    def save_state(self) -> bytes | Iterable[bytes]:
        """Return the state of the device, which stands still, as a whole or in pieces."""

    def load_piece(self, data: bytes, first: bool) -> bool:
        """Take a piece of a state, or return False to have it collected."""

    def load_state(self, state: bytes) -> None:
        """Take a state over.  Raise RequestError for one that is malformed."""

    def set_running(self, running: bool) -> Awaitable[None] | None:
        """Stand still, or continue."""


class MigrationMachine:
    """The migration state of one device."""

    def __init__(self, device: Migratable) -> None:
        self.state = DeviceState.RUNNING
        self._device = device
        self._running = True
        self._outgoing = b""
        self._pieces: Iterator[bytes] = iter(())  # of the outgoing state, after _outgoing
        self._save_failed = False
        self._incoming = bytearray()
        self._taken = False  # pieces of the incoming state are in the device

    @property
    def is_running(self) -> bool:
        """Return whether the device may change memory and raise interrupts."""
        return self.state in _ACTIVE

    def save(self) -> MigrationState:
        """Return the state, and the data that is under way.

        Raise :class:`~vfio_user.errors.RequestError` EBUSY where a part of it is in the device.
        """
        if self._taken or self._save_failed:
            raise RequestError(errno.EBUSY, "a state that is taken over in pieces")
        self._outgoing += b"".join(self._pieces)
        return MigrationState(
            state=int(self.state), outgoing=self._outgoing, incoming=bytes(self._incoming)
        )

    def check(self, saved: MigrationState) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` for a state that cannot be."""
        require(saved.state in _STATES, f"migration state {saved.state}")
        require(len(saved.incoming) <= MAX_STATE_SIZE, "more device state than the limit")
        require(not saved.incoming or saved.state == _RESUMING, "incoming data while not resuming")
        require(not saved.outgoing or saved.state in _SAVING, "outgoing data while not saving")

    def restore(self, saved: MigrationState) -> None:
        """Take a checked state over."""
        finish(self._run(saved.state in _ACTIVE))
        self._settle(DeviceState(saved.state))
        self._outgoing = saved.outgoing
        self._incoming[:] = saved.incoming

    def reset(self) -> None:
        """Return to RUNNING as :meth:`resetting` does, with a device that does not wait."""
        finish(self.resetting())

    def resetting(self) -> Steps[None]:
        """Return to RUNNING from every state, ERROR included: a device reset."""
        yield from self._run(True)
        self._settle(DeviceState.RUNNING)

    def go(self, wanted: int) -> list[DeviceState]:
        """Walk to the state *wanted* as :meth:`walk` does, with a device that does not wait."""
        return finish(self.walk(wanted))

    def walk(self, wanted: int) -> Steps[list[DeviceState]]:
        """Walk to the state *wanted*; return the states passed, the last one included.

        Raise :class:`~vfio_user.errors.RequestError` EINVAL for a state that does not exist or
        cannot be reached, and whatever the device raises on the way; the state is then the last
        one that was reached, or ERROR where the device could neither be stopped nor continued.
        """
        try:
            target = DeviceState(wanted)
        except ValueError:
            raise RequestError(errno.EINVAL, f"no migration state {wanted}") from None
        path: list[DeviceState] = []
        while self.state != target:
            following = NEXT_HOP.get((self.state, target))
            if following is None:
                raise RequestError(errno.EINVAL, f"no way from {self.state.name} to {target.name}")
            yield from self._take(following)
            path.append(following)
        return path

    def _take(self, following: DeviceState) -> Steps[None]:
        """Take one arc.  Where the device fails, the state stays, or becomes ERROR."""
        if self.state == _RESUMING:
            self._device.load_state(bytes(self._incoming))
        before = self.state
        yield from self._run(following in _ACTIVE)
        outgoing = b""
        pieces: Iterator[bytes] = iter(())
        if following == _STOP_COPY:  # the device stands still by now
            try:
                outgoing, pieces = self._save()
            except BaseException:
                yield from self._run(before in _ACTIVE)
                raise
        self._settle(following)
        self._outgoing, self._pieces = outgoing, pieces

    def _save(self) -> tuple[bytes, Iterator[bytes]]:
        """Return what is still unread of PRE_COPY with the first piece, and the others."""
        saved = self._device.save_state()
        if isinstance(saved, bytes):
            return self._outgoing + saved, iter(())
        pieces = iter(saved)
        return self._outgoing + next(pieces, b""), pieces

    def _run(self, running: bool) -> Steps[None]:
        """Make the device run or stand still; ERROR if it fails to."""
        if self._running == running:
            return
        try:
            yield from awaited(self._device.set_running(running))
        except BaseException:
            self._settle(DeviceState.ERROR)
            self._running = False  # a reset makes it run again
            raise
        self._running = running

    def _settle(self, state: DeviceState) -> None:
        self.state = state
        self._outgoing, self._pieces, self._save_failed = b"", iter(()), False
        self._incoming.clear()
        self._taken = False

    def read(self, size: int) -> bytes:
        """Return the next bytes of saved state, at most *size*; fewer if there are no more now.

        What the device gives while it runs comes in PRE_COPY, the rest in STOP_COPY.  Raise
        :class:`~vfio_user.errors.RequestError` EINVAL in any other state, EIO once a piece could
        not be saved, and what the device raises for that piece.
        """
        if self.state not in _SAVING:
            raise RequestError(errno.EINVAL, f"MIG_DATA_READ in state {self.state.name}")
        if self._save_failed:  # what follows would be taken for the end of the state
            raise RequestError(errno.EIO, "the state could not be saved")
        if self.state == _PRE_COPY and len(self._outgoing) < size:
            self._outgoing += self._device.save_running()
        while len(self._outgoing) < size:
            try:
                self._outgoing += next(self._pieces)
            except StopIteration:
                break
            except Exception:
                self._save_failed = True
                raise
        data, self._outgoing = self._outgoing[:size], self._outgoing[size:]
        return data

    def write(self, data: bytes) -> None:
        """Add bytes to the state to take over.

        Raise :class:`~vfio_user.errors.RequestError`: EINVAL outside RESUMING, EFBIG for more
        than :data:`MAX_STATE_SIZE` that is collected, and what the device raises for a piece.
        """
        if self.state != _RESUMING:
            raise RequestError(errno.EINVAL, f"MIG_DATA_WRITE in state {self.state.name}")
        if not self._incoming and self._device.load_piece(data, not self._taken):
            self._taken = True
            return
        if len(self._incoming) + len(data) > MAX_STATE_SIZE:
            raise RequestError(errno.EFBIG, "more device state than the limit")
        self._incoming += data
