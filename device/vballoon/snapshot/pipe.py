# SPDX-License-Identifier: Apache-2.0
"""Write a snapshot to a stream as frames, and unpack it into a directory at the other end."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot.copy import CHUNK, SparseHash
from vballoon.snapshot.link import LinkLost
from vballoon.snapshot.store import ram_name
from vballoon_spec.snapshot import (
    MANIFEST_FILE,
    MOVE_MAGIC,
    STATE_FILE,
    STREAM_MAGIC,
    Frame,
    FrameKind,
    SnapshotManifest,
    SnapshotManifestError,
)
from virtio_formats.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.memory import ByteRanges
    from vballoon.snapshot.link import Link

__all__ = ("MoveStore", "StreamStore", "unpack", "unpack_from")

PIECE = 16 * CHUNK
"""Maximum bytes of memory in one frame."""
FILES_MAX = 1024
STATE_MAX = 1 << 30
STATE_ROOM = 16 << 20
"""Space kept free for the device state, more than it needs."""
MANIFEST_MAX = 16 << 20
"""Limits of a reader; no real machine exceeds them."""


class StreamStore:
    """Write a snapshot to the descriptor *fd*, which the caller keeps."""

    magic = STREAM_MAGIC

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digests: list[str] = []
        self._write(self.magic)  # fails if the pipe has no reader; nothing is open yet
        self._state = os.memfd_create("vballoon-state", os.MFD_CLOEXEC)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _frame(self, kind: FrameKind, data: bytes, file: int = 0, offset: int = 0) -> None:
        self._write(Frame(kind=kind, file=file, offset=offset, length=len(data)).build())
        self._write(data)

    def expect(self, size: int) -> None:
        """Announce to the reader how many bytes of memory follow."""
        self._frame(FrameKind.SIZE, b"", offset=size)

    def open_state(self) -> int:
        """Return a descriptor for QEMU to write the device state to."""
        return os.open(f"/proc/self/fd/{self._state}", os.O_WRONLY | os.O_CLOEXEC)

    def copy(
        self,
        index: int,
        name: str,
        source: int,
        size: int,
        extents: ByteRanges,
        progress: Callable[[int], None],
    ) -> int:
        """Send the extents and hash them on the way: they cannot be read back."""
        del name
        digest, total = SparseHash(size), 0
        for start, end in extents:
            for at in range(start, end, PIECE):
                data = os.pread(source, min(PIECE, end - at), at)
                if len(data) != min(PIECE, end - at):
                    raise OSError("guest memory ends before its size")
                self._frame(FrameKind.DATA, data, index, at)
                digest.add(at, data)
                total += len(data)
                progress(len(data))
        self._digests.append(digest.hexdigest())
        return total

    def change_state(self, change: Callable[[bytes], bytes]) -> None:
        """Change the device state before it is sent."""
        state = change(os.pread(self._state, os.fstat(self._state).st_size, 0))
        os.ftruncate(self._state, 0)
        os.pwrite(self._state, state, 0)

    def digests(self) -> tuple[int, str, list[str]]:
        """Send the state. Return its size and checksum, and the checksums of the memory sent."""
        size = os.fstat(self._state).st_size
        state = os.pread(self._state, size, 0)
        self._frame(FrameKind.STATE, state)
        return size, hashlib.sha256(state).hexdigest(), self._digests

    def finish(self, manifest: SnapshotManifest) -> None:
        """Send the manifest, which ends the stream."""
        self._frame(FrameKind.MANIFEST, manifest.dumps().encode())
        self._close()

    def discard(self) -> None:
        """End the stream without a manifest."""
        self._close()

    def _close(self) -> None:
        state, self._state = self._state, -1
        if state >= 0:
            os.close(state)


class MoveStore(StreamStore):
    """Write a snapshot to *link*, of which it is the source."""

    magic = MOVE_MAGIC

    def __init__(self, link: Link) -> None:
        self._link = link
        self.digest = b""
        """SHA-256 of the manifest that was sent."""
        super().__init__(-1)

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._link.write(data)
        except LinkLost as error:
            raise UsageError(f"the machine was not moved: {self._reason(str(error))}") from None

    def _reason(self, error: str) -> str:
        """Return why the destination does not take the machine, if it has said so."""
        try:
            kind, body = self._link.receive()
        except LinkLost:
            return error
        refused = kind == FrameKind.REFUSED
        return f"the destination reports: {body.decode(errors='replace')}" if refused else error

    def finish(self, manifest: SnapshotManifest) -> None:
        """Send the manifest."""
        self.digest = hashlib.sha256(manifest.dumps().encode()).digest()
        super().finish(manifest)


def unpack(fd: int, directory: Path) -> None:
    """Read a stream from *fd* into the existing, empty *directory*.

    The manifest is written last, so that the directory of a stream that ended early is refused
    like any incomplete snapshot.  Raise :class:`~vballoon.errors.UsageError`.
    """
    unpack_from(lambda size: _read(fd, size), directory, STREAM_MAGIC)
    if _read(fd, 1):
        (directory / MANIFEST_FILE).unlink()
        raise UsageError("data after the end of the snapshot stream")


def unpack_from(read: Callable[[int], bytes], directory: Path, magic: bytes) -> bytes:
    """Read a stream up to its manifest with *read*, into the existing, empty *directory*.

    *read* returns as many bytes as it is asked for, or fewer at the end.  Return the manifest.
    Raise :class:`~vballoon.errors.UsageError`.
    """
    if read(len(magic)) != magic:
        raise UsageError("not a snapshot stream")
    reader = _Unpacker(directory)
    try:
        while reader.manifest is None:
            try:
                frame = Frame.parse(read(Frame.SIZE))
            except WireError:
                raise UsageError("the snapshot stream ended early") from None
            reader.take(read, frame)
        reader.finish()
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror or error}") from None
    finally:
        reader.close()
    return reader.manifest


def _read(fd: int, size: int) -> bytes:
    """Return *size* bytes, or fewer at the end of the stream."""
    parts: list[bytes] = []
    while size and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Unpacker:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: bytes | None = None
        self._files: dict[int, int] = {}
        self._state = 0

    def take(self, read: Callable[[int], bytes], frame: Frame) -> None:
        if frame.kind == FrameKind.DATA and frame.length <= PIECE and frame.file < FILES_MAX:
            if frame.offset >= 1 << 62:
                raise UsageError(f"the stream has memory at {frame.offset:#x}")
            os.pwrite(self._file(frame.file), self._body(read, frame), frame.offset)
        elif frame.kind == FrameKind.STATE and self._state + frame.length <= STATE_MAX:
            self._state += frame.length
            with (self.directory / STATE_FILE).open("ab") as file:
                file.write(self._body(read, frame))
        elif frame.kind == FrameKind.SIZE and not frame.length:
            self._require_room(frame.offset)
        elif frame.kind == FrameKind.MANIFEST and frame.length <= MANIFEST_MAX:
            self.manifest = self._body(read, frame)
        else:
            raise UsageError(f"the stream has a frame {frame.kind} of {frame.length} bytes")

    def _require_room(self, size: int) -> None:
        status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize
        if free < size + STATE_ROOM:
            raise UsageError(f"{self.directory}: need {size >> 20} MiB, have {free >> 20} MiB")

    @staticmethod
    def _body(read: Callable[[int], bytes], frame: Frame) -> bytes:
        data = read(frame.length)
        if len(data) != frame.length:
            raise UsageError("the snapshot stream ended early")
        return data

    def _file(self, index: int) -> int:
        if index not in self._files:
            self._files[index] = os.open(
                self.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600
            )
        return self._files[index]

    def finish(self) -> None:
        """Give the files their names and sizes, and the directory its manifest."""
        assert self.manifest is not None
        try:
            manifest = SnapshotManifest.loads(self.manifest)
        except (SnapshotManifestError, UnicodeDecodeError) as error:
            raise UsageError(f"the stream's manifest: {error}") from None
        for index, memory in enumerate(manifest.memory):
            if memory.file != ram_name(memory.id):
                raise UsageError(f"the stream calls the memory of {memory.id} {memory.file}")
            os.ftruncate(self._file(index), memory.size)
            file = self._file(index)
            os.link(  # without a folder's descriptor Python would not follow the link
                f"/proc/self/fd/{file}", self.directory / memory.file, src_dir_fd=file
            )
        (self.directory / MANIFEST_FILE).write_bytes(self.manifest)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
