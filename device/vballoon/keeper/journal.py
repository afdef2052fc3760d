# SPDX-License-Identifier: Apache-2.0
"""The state of a worker in a memfd that outlives it.

Two records are used in turn.  A record is a header (magic, version, sequence number, length,
checksum over all of it) and its content; it is valid or not, so a process that is killed between
any two stores leaves the older one.  What is read back is checked like any untrusted input: a
worker may have been taken over before it died.

The journal is locked by a process-owned ``fcntl`` lock.  The kernel releases it when the process
dies, although the keeper still holds the file (``flock`` and open-file-description locks would
stay).  It is also released when the process closes *any* descriptor of the file: do not duplicate.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib

from vballoon.errors import VballoonError
from vballoon.keeper import fault

__all__ = ("RECORD_MAX", "Journal", "JournalError")

RECORD_SIZE = 1 << 18
"""Bytes for each record; pages are allocated when they are written."""
_HEADER = struct.Struct("<8sIIQI")
RECORD_MAX = RECORD_SIZE - _HEADER.size
"""Bytes of content that fit."""
_MAGIC = b"VBALJRNL"


class JournalError(VballoonError):
    """The journal cannot be used: it is malformed, locked by another process, or too small."""


class Journal:
    """The journal in memfd *fd*, which it owns.  *version* is that of the content."""

    def __init__(self, fd: int, version: int) -> None:
        self.fd = fd
        self._version = version
        if os.fstat(fd).st_size != 2 * RECORD_SIZE:
            raise JournalError(f"a journal has {2 * RECORD_SIZE} bytes")
        self._lock()
        self._sequence, self.content = self._newest()

    @classmethod
    def create(cls, version: int) -> Journal:
        """Return an empty journal in a new memfd, whose size is sealed."""
        fd = os.memfd_create("vballoon-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 2 * RECORD_SIZE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd, version)

    def _lock(self) -> None:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError("another worker serves this machine") from None

    @property
    def sequence(self) -> int:
        """How many records have been written."""
        return self._sequence

    def write(self, content: bytes) -> None:
        """Make *content* the newest record.  Raise JournalError if it is too long."""
        if len(content) > RECORD_MAX:
            raise JournalError(f"{len(content)} bytes of state, at most {RECORD_MAX}")
        sequence = self._sequence + 1
        record = _record(self._version, sequence, content)
        where = RECORD_SIZE * (sequence % 2)
        fault.step("journal-begin")
        os.pwrite(self.fd, record[:1], where)  # from here on the older record is invalid
        fault.step("journal-first")
        os.pwrite(self.fd, record, where)
        fault.step("journal-written")
        self._sequence, self.content = sequence, content

    def _newest(self) -> tuple[int, bytes | None]:
        """Return sequence number and content of the newest valid record; 0 and None without one."""
        found: list[tuple[int, bytes]] = []
        for where in (0, RECORD_SIZE):
            record = self._read(where)
            if record is not None and record[0] % 2 * RECORD_SIZE == where:
                found.append(record)
        return max(found, default=(0, None))

    def _read(self, where: int) -> tuple[int, bytes] | None:
        head = os.pread(self.fd, _HEADER.size, where)
        magic, version, length, sequence, checksum = _HEADER.unpack(head)
        if magic != _MAGIC or length > RECORD_MAX or not 0 < sequence < 1 << 63:
            return None
        content = os.pread(self.fd, length, where + _HEADER.size)
        if checksum != _checksum(version, length, sequence, content):
            return None
        if version != self._version:
            raise JournalError(f"written by version {version}, this program reads {self._version}")
        return sequence, content

    def close(self) -> None:
        """Close the file, which releases the lock."""
        os.close(self.fd)


def _record(version: int, sequence: int, content: bytes) -> bytes:
    checksum = _checksum(version, len(content), sequence, content)
    return _HEADER.pack(_MAGIC, version, len(content), sequence, checksum) + content


def _checksum(version: int, length: int, sequence: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<IIQ", version, length, sequence)))
