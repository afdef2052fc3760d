# SPDX-License-Identifier: Apache-2.0
"""Copy extents of one file into another, and compute the checksum of a sparse file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from vballoon.memory import PAGE_SIZE
from vballoon.snapshot.extents import data_extents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from vballoon.memory import ByteRanges

    Mover = Callable[[int, int, int, int], int]

__all__ = ("CHUNK", "SparseHash", "copy_extents", "fill", "sparse_digest")

CHUNK = 65536
"""Bytes of a chunk of a checksum (specification: *Checksums*)."""
_ZEROES = bytes(CHUNK)
PIECE = 8 << 20
"""Bytes moved between two calls of the progress callback, at most."""
_UNABLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}


def copy_extents(
    source: int,
    target: int,
    extents: ByteRanges,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Copy *extents* to the same places of *target*. Return the bytes.

    The kernel moves the bytes: with ``copy_file_range`` where both are on one file system (which
    shares blocks where it can), else with ``sendfile``, else by reading and writing.  *progress*
    gets the number of bytes moved since its last call.  Raise :class:`OSError`.
    """
    movers: list[Mover] = [_copy_file_range, _sendfile, _read_write]
    if os.fstat(source).st_dev != os.fstat(target).st_dev:
        del movers[0]
    total = 0
    for start, end in extents:
        at = start
        while at < end:
            at += _move(movers, source, target, at, min(end - at, PIECE))
            progress(at - start)
            total += at - start
            start = at
    return total


def _move(movers: list[Mover], source: int, target: int, at: int, size: int) -> int:
    while True:
        try:
            moved = movers[0](source, target, at, size)
        except OSError as error:
            if len(movers) == 1 or error.errno not in _UNABLE:
                raise
            del movers[0]
        else:
            if not moved:
                raise OSError(errno.EIO, "guest memory ends before its size")
            return moved


def _copy_file_range(source: int, target: int, at: int, size: int) -> int:
    return os.copy_file_range(source, target, size, at, at)


def _sendfile(source: int, target: int, at: int, size: int) -> int:
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, at, size)


def _read_write(source: int, target: int, at: int, size: int) -> int:
    return os.pwrite(target, os.pread(source, min(size, 1 << 20), at), at)


def fill(source: int, target: int, digest: SparseHash | None = None) -> int:
    """Copy the data of *source* into the new file *target*. Return the bytes written.

    Add to *digest* what was read, in another thread while it is written: the bytes that are
    checked are the bytes that are used.

    Chunks of zeroes become holes, also where *source* has stored them: a snapshot that was copied
    without its holes needs no more memory than the original.  *target* may be on hugetlbfs, which
    has no write().  Raise :class:`OSError`.
    """
    size = os.fstat(source).st_size
    block = os.fstatvfs(target).f_bsize
    os.ftruncate(target, -(-size // block) * block if block > PAGE_SIZE else size)
    buffers, total = [memoryview(bytearray(16 * CHUNK)) for _ in range(2)], 0
    with contextlib.ExitStack() as stack:
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        hashed: Future[None] | None = None
        write = partial(_write, target)
        if block > PAGE_SIZE:
            mapping = stack.enter_context(mmap.mmap(target, os.fstat(target).st_size))
            write = partial(_store, mapping)
        for start, end in data_extents(source, size).tolist():
            at = start
            while at < end:
                buffer = buffers[0][: min(end - at, len(buffers[0]) - at % CHUNK)]
                got = os.preadv(source, [buffer], at)
                if not got:
                    raise OSError(errno.EIO, "the file became shorter")
                if hashed is not None:
                    hashed.result()  # the other buffer is free again
                if digest is not None:
                    hashed = hasher.submit(digest.add, at, buffer[:got])
                for place, part in _chunks(at, buffer[:got]):
                    write(place, part)
                    total += len(part)
                at += got
                buffers.reverse()
        if hashed is not None:
            hashed.result()
    return total


def _chunks(at: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the parts of *data*, at offset *at*, that lie in one chunk and are not all zero."""
    while data:
        part = data[: CHUNK - at % CHUNK]
        if part != _ZEROES[: len(part)]:
            yield at, part
        at, data = at + len(part), data[len(part) :]


def _write(target: int, at: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(target, data, at)
        at, data = at + written, data[written:]


def _store(mapping: mmap.mmap, at: int, data: memoryview) -> None:
    mapping[at : at + len(data)] = data


class SparseHash:
    """SHA-256 of a file of *size* bytes, whether its zeroes are stored or are holes.

    Data must be added in ascending order (specification: *Checksums*).
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._digest = hashlib.sha256()
        self._chunk = bytearray(CHUNK)
        self._start = -1

    def add(self, at: int, data: bytes | memoryview) -> None:
        """Add *data*, which is at offset *at*. Bytes skipped since the last call are zero."""
        view = memoryview(data)
        while view:
            start, inside = at - at % CHUNK, at % CHUNK
            if start != self._start:
                self._flush()
                self._start = start
            part = view[: CHUNK - inside]
            if len(part) == CHUNK:  # the common case needs no copy
                self._take(start, part)
                self._start = -1
                at, view = at + CHUNK, view[CHUNK:]
                continue
            self._chunk[inside : inside + len(part)] = part
            at, view = at + len(part), view[len(part) :]

    def _flush(self) -> None:
        if self._start >= 0:
            self._take(self._start, memoryview(self._chunk))
            self._chunk = bytearray(CHUNK)

    def _take(self, start: int, chunk: memoryview) -> None:
        if chunk != _ZEROES:
            self._digest.update(start.to_bytes(8, "little"))
            self._digest.update(chunk[: min(CHUNK, self._size - start)])

    def hexdigest(self) -> str:
        """Return the checksum. Nothing may be added afterwards."""
        self._flush()
        self._start = -1
        return self._digest.hexdigest()


def sparse_digest(fd: int) -> str:
    """Return the :class:`SparseHash` of the file at *fd*."""
    size = os.fstat(fd).st_size
    digest, buffer = SparseHash(size), memoryview(bytearray(16 * CHUNK))
    for start, end in data_extents(fd, size):
        at = start
        while at < end:
            got = os.preadv(fd, [buffer[: end - at]], at)
            if not got:
                break  # the file was truncated meanwhile: the checksum will differ
            digest.add(at, buffer[:got])
            at += got
    return digest.hexdigest()
