# SPDX-License-Identifier: Apache-2.0
"""Send answers exactly once, although the sender may be killed at any moment.

An answer lies in a memfd that is in the store, and is sent with ``sendfile`` without an offset of
its own: the shared file offset advances within the same system call, so the next process sees how
much of the answer was sent.  Two areas are used in turn, because the offset must say "all sent" for
an old answer until the journal names the new one.

``sendfile`` passes the page itself to the socket, it does not copy.  A page must therefore not be
written again while the peer may not have read it: a hole is punched first, so that the area gets
fresh pages and the old ones stay with the socket.
"""

from __future__ import annotations

import fcntl
import os

from vballoon.keeper import fault
from vballoon.memory.discard import punch_hole

__all__ = ("ANSWER_MAX", "AnswerFile")

ANSWER_MAX = 1 << 21
"""Bytes of one answer: vfio-user moves up to 1 MiB at once, with its header."""


class AnswerFile:
    """The answers in memfd *fd*, which it owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        if os.fstat(fd).st_size != 2 * ANSWER_MAX:
            raise ValueError("not a file of answers")

    @classmethod
    def create(cls) -> AnswerFile:
        """Return a new file of answers, whose size is sealed."""
        fd = os.memfd_create("vballoon-answers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 2 * ANSWER_MAX)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd)

    def prepare(self, number: int, data: bytes) -> None:
        """Write the answer to message *number*; nothing of it is sent yet."""
        if len(data) > ANSWER_MAX:
            raise ValueError(f"an answer of {len(data)} bytes")
        start = _start(number)
        punch_hole(self.fd, start, ANSWER_MAX)
        os.pwrite(self.fd, data, start)
        fault.step("answer-prepared")
        os.lseek(self.fd, start, os.SEEK_SET)

    def unsent(self, number: int, size: int) -> int:
        """Return how many bytes of the answer of *size* bytes to message *number* were not sent."""
        done = os.lseek(self.fd, 0, os.SEEK_CUR) - _start(number)
        return size - done if 0 <= done < size else 0

    def send(self, sock: int, number: int, size: int) -> bool:
        """Send the rest of the answer; return whether all of it was sent.

        Raise OSError for a connection that has ended.
        """
        while left := self.unsent(number, size):
            try:
                os.sendfile(sock, self.fd, None, left)
            except BlockingIOError:
                return False
            fault.step("answer-sent-part")
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def _start(number: int) -> int:
    return ANSWER_MAX * (number % 2)
