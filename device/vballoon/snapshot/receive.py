# SPDX-License-Identifier: Apache-2.0
"""The destination's side of a move, over a link."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot.link import LinkLost
from vballoon.snapshot.move import Destination, DestinationInput, destination
from vballoon.snapshot.pipe import unpack_from
from vballoon.snapshot.store import open_snapshot
from vballoon_spec.snapshot import MOVE_MAGIC, FrameKind

if TYPE_CHECKING:
    from vballoon.snapshot.link import Link
    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("PENDING_FILE", "Receiver", "decide", "require_decided")

PENDING_FILE = "move-pending"
"""In the directory of a machine that was moved here and for which no COMMIT has come."""


class Receiver:
    """Follows the destination's state table; puts the snapshot into *directory*, which is empty."""

    def __init__(self, link: Link, directory: Path) -> None:
        self.state = Destination.RECEIVING
        self._link, self._directory = link, directory
        self._digest = b""

    def receive(self) -> SnapshotManifest:
        """Receive, check and sync the snapshot, then send VERIFIED. Raise UsageError."""
        try:
            text = unpack_from(self._link.read, self._directory, MOVE_MAGIC)
            (self._directory / PENDING_FILE).touch()
            manifest = open_snapshot(self._directory)
            _sync_all(self._directory)
        except LinkLost:
            self.state = destination(self.state, DestinationInput.LOST)
            raise
        except (UsageError, OSError) as error:
            self.refuse(str(error))
            raise UsageError(str(error)) from None
        self._digest = hashlib.sha256(text).digest()
        self.state = destination(self.state, DestinationInput.COMPLETE)
        with contextlib.suppress(LinkLost):  # found out again when COMMIT is awaited
            self._link.send(FrameKind.VERIFIED, self._digest)
        return manifest

    def wait_commit(self) -> None:
        """Wait for COMMIT. Raise UsageError if it does not come: then do not run the machine."""
        try:
            kind, body = self._link.receive()
        except LinkLost as error:
            self.state = destination(self.state, DestinationInput.LOST)
            raise UsageError(
                f"{error}. The machine is complete in {self._directory}, but it may still run at "
                "its old place. If it has gone from there ('vballoon snapshot --undo --commit' "
                f"ends it), run it here with 'vballoon restore --commit {self._directory} -- "
                "COMMAND'; otherwise remove the directory"
            ) from None
        if kind == FrameKind.ABORT and body == self._digest:
            self.state = destination(self.state, DestinationInput.ABORT)
            raise UsageError("the machine was not moved: it runs on at its old place")
        if kind != FrameKind.COMMIT or body != self._digest:
            self.state = destination(self.state, DestinationInput.LOST)
            raise UsageError(f"message {kind} came instead of COMMIT")
        decide(self._directory)
        self.state = destination(self.state, DestinationInput.COMMIT)

    def running(self) -> None:
        """Send RUNNING: the guest runs here."""
        self.state = destination(self.state, DestinationInput.STARTED)
        with contextlib.suppress(LinkLost):  # the source stays stopped and prints what to do
            self._link.send(FrameKind.RUNNING, self._digest)

    def refuse(self, why: str) -> None:
        """Send REFUSED: the guest will not run here by itself."""
        self.state = destination(self.state, DestinationInput.BROKEN)
        with contextlib.suppress(LinkLost):
            self._link.send(FrameKind.REFUSED, why.encode()[:1024])


def require_decided(directory: Path) -> None:
    """Raise UsageError if the machine in *directory* may still run where it came from."""
    if (directory / PENDING_FILE).exists():
        raise UsageError(
            f"the machine in {directory} was being moved here and may still run at its old place; "
            "if it has ended there, run it with --commit"
        )


def decide(directory: Path) -> None:
    """Note that the machine in *directory* may run here."""
    (directory / PENDING_FILE).unlink(missing_ok=True)
    _sync(directory)


def _sync_all(directory: Path) -> None:
    """Have all of *directory*, and its name, on the disk."""
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)
    _sync(directory.absolute().parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
