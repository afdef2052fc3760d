# SPDX-License-Identifier: Apache-2.0
"""Write a snapshot to a directory, and open one: complete, or refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vballoon.errors import UsageError
from vballoon.memory.discard import punch_hole
from vballoon.snapshot.copy import copy_extents, sparse_digest
from vballoon.snapshot.extents import data_extents
from vballoon_spec.snapshot import (
    MANIFEST_FILE,
    STATE_FILE,
    SnapshotManifest,
    SnapshotManifestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader

    from vballoon.memory import ByteRanges

__all__ = ("DirectoryStore", "Store", "open_plain", "open_snapshot", "ram_name")

MANIFEST_MAX = 16 << 20
"""Maximum bytes of a manifest."""


_ZEROES = bytes(1 << 20)


class Store(Protocol):
    """What a snapshot is written to. Methods raise :class:`OSError` where writing fails."""

    def open_state(self) -> int:
        """Return a descriptor for QEMU to write the device state to. The caller closes it."""

    def expect(self, size: int) -> None:
        """Announce that *size* bytes of guest memory will be copied in total."""

    def copy(
        self,
        index: int,
        name: str,
        source: int,
        size: int,
        extents: ByteRanges,
        progress: Callable[[int], None],
    ) -> int:
        """Copy *extents* of a file of guest memory of *size* bytes. Return the bytes copied."""

    def change_state(self, change: Callable[[bytes], bytes]) -> None:
        """Replace the device state by what *change* returns for it."""

    def digests(self) -> tuple[int, str, list[str]]:
        """Return size and checksum of the state, and the memory files' checksums in order."""

    def finish(self, manifest: SnapshotManifest) -> None:
        """Make what was written a snapshot."""

    def discard(self) -> None:
        """Remove what was written; safe to call at any time, also twice."""


def ram_name(ident: str) -> str:
    """Return the file name for memory backend *ident*."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in ident)
    return f"{safe}.ram"


class DirectoryStore:
    """A snapshot in the directory *path*, new or empty. Raise UsageError where it cannot be."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: list[Path] = []
        self._made = False
        try:
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700)
                self._made = True
            elif any(self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty")
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from None

    def _create(self, name: str, mode: int) -> int:
        path = self.path / name
        if path in self._files:  # a further round of a live snapshot
            return os.open(path, mode | os.O_CLOEXEC)
        fd = os.open(path, mode | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._files.append(path)
        return fd

    def open_state(self) -> int:
        """Return a descriptor for QEMU to write the device state to."""
        return self._create(STATE_FILE, os.O_WRONLY)

    def expect(self, size: int) -> None:
        """Do nothing: where the file system can share blocks, they need no space."""

    def copy(
        self,
        index: int,
        name: str,
        source: int,
        size: int,
        extents: ByteRanges,
        progress: Callable[[int], None],
    ) -> int:
        """Copy into the sparse file *name*, which an earlier round may have made."""
        del index
        fd = self._create(name, os.O_RDWR)
        try:
            os.ftruncate(fd, size)
            return copy_extents(source, fd, extents, progress)
        finally:
            os.close(fd)

    def keep_only(self, name: str, extents: ByteRanges) -> int:
        """Blank what was copied outside *extents*. Return the bytes that are left."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            there = data_extents(fd, os.fstat(fd).st_size)
            for start, end in there - extents:
                _blank(fd, start, end)
            return (there & extents).total
        finally:
            os.close(fd)

    def change_state(self, change: Callable[[bytes], bytes]) -> None:
        """Rewrite the device state."""
        path = self.path / STATE_FILE
        path.write_bytes(change(path.read_bytes()))

    def digests(self) -> tuple[int, str, list[str]]:
        """Read everything back from the files, while they are synced to disk."""
        memory, state = [], (0, "")
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._files]
            pool = stack.enter_context(ThreadPoolExecutor(max(len(files), 1)))
            on_disk = [pool.submit(os.fsync, file.fileno()) for file in files]
            for path, file in zip(self._files, files, strict=True):
                if path.name == STATE_FILE:
                    state = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
                else:
                    memory.append(sparse_digest(file.fileno()))
            for each in on_disk:
                each.result()
        return *state, memory

    def finish(self, manifest: SnapshotManifest) -> None:
        """Write the manifest last, atomically, after everything else is on the disk."""
        draft = self.path / f".{MANIFEST_FILE}"
        self._files.append(draft)
        with draft.open("w") as file:
            file.write(manifest.dumps())
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.path / MANIFEST_FILE)
        _sync(self.path)
        _sync(self.path.absolute().parent)  # the directory's own name

    def discard(self) -> None:
        """Remove what was written, and the directory if this object made it."""
        for path in [self.path / MANIFEST_FILE, *self._files]:
            path.unlink(missing_ok=True)
        if self._made:
            try:
                self.path.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise


def _blank(fd: int, start: int, end: int) -> None:
    """Make bytes *start* to *end* a hole, or zeroes where the file system has none."""
    try:
        punch_hole(fd, start, end - start)
    except OSError:
        for at in range(start, end, len(_ZEROES)):
            os.pwrite(fd, _ZEROES[: end - at], at)


def _sync(directory: Path) -> None:
    """Sync the names in *directory* to disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_snapshot(path: str | os.PathLike[str], *, verify: bool = True) -> SnapshotManifest:
    """Check the snapshot at *path* and every file that it names. Return its manifest.

    Without *verify*, memory's checksums are not compared; sizes always are.  Raise
    :class:`~vballoon.errors.UsageError` for anything that is not a whole snapshot.
    """
    directory = Path(path)
    try:
        with open_plain(directory / MANIFEST_FILE) as file:
            manifest = SnapshotManifest.loads(file.read(MANIFEST_MAX))
        _check_files(directory, manifest, verify)
    except FileNotFoundError as error:
        raise UsageError(f"{directory} is not a whole snapshot: no {error.filename}") from None
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}") from None
    except (SnapshotManifestError, UnicodeDecodeError) as error:
        raise UsageError(f"{directory / MANIFEST_FILE}: {error}") from None
    return manifest


def open_plain(path: Path) -> BufferedReader:
    """Open a file of an untrusted snapshot: no link to elsewhere, no device, no pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path} is not a plain file") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a plain file")
    return os.fdopen(fd, "rb")


def _check_files(directory: Path, manifest: SnapshotManifest, verify: bool) -> None:
    state = directory / manifest.state.file
    with open_plain(state) as file:
        good = os.fstat(file.fileno()).st_size == manifest.state.bytes
        digest = hashlib.file_digest(file, "sha256").hexdigest() if good else ""
    if digest != manifest.state.sha256:
        raise UsageError(f"{state} differs from the manifest")
    for memory in manifest.memory:
        with open_plain(directory / memory.file) as file:
            good = os.fstat(file.fileno()).st_size == memory.size
            if not good or (verify and sparse_digest(file.fileno()) != memory.sha256):
                raise UsageError(f"{directory / memory.file} differs from the manifest")
