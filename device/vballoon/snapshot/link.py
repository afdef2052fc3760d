# SPDX-License-Identifier: Apache-2.0
"""A link between the two sides of a move: frames both ways, with a limit on silence."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

from vballoon.errors import UsageError
from vballoon_spec.snapshot import Frame, FrameKind
from virtio_formats.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Link", "LinkLost")

TEXT_MAX = 4096
"""Maximum bytes of a message's body."""


class LinkLost(UsageError):
    """The other side has gone, or has been silent for too long."""


class Link:
    """Reads from *reader*, writes to *writer*; owns both. A context manager.

    *silence*: how long a write or a read may wait, s.  Raises LinkLost.
    """

    def __init__(
        self,
        reader: int,
        writer: int,
        *,
        silence: float = 600.0,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.reader, self.writer = reader, writer
        self.silence = silence
        self._process = process
        os.set_blocking(writer, False)

    @classmethod
    def run(cls, command: Sequence[str], *, silence: float) -> Link:
        """Run *command* and talk to its standard input and output."""
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UsageError(f"{command[0]}: {error.strerror}") from None
        assert process.stdin
        assert process.stdout
        reader, writer = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
        process.stdout.close()
        process.stdin.close()
        return cls(reader, writer, silence=silence, process=process)

    @classmethod
    def connect(cls, path: str, *, silence: float) -> Link:
        """Connect to the Unix socket at *path*."""
        with socket.socket(socket.AF_UNIX) as end:
            try:
                end.connect(path)
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from None
            return cls(os.dup(end.fileno()), os.dup(end.fileno()), silence=silence)

    @classmethod
    def listen(cls, path: str, *, silence: float) -> Link:
        """Take one connection on a Unix socket at *path*, which only this user can reach."""
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.umask(0o177)
            try:
                listener.bind(path)
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from None
            finally:
                os.umask(before)
            try:
                listener.listen(1)
                end, _ = listener.accept()
            finally:
                os.unlink(path)
            with end:
                return cls(os.dup(end.fileno()), os.dup(end.fileno()), silence=silence)

    def write(self, data: bytes | memoryview) -> None:
        """Write all of *data*."""
        view = memoryview(data)
        while view:
            self._wait(self.writer, select.POLLOUT)
            try:
                view = view[os.write(self.writer, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkLost(f"the link broke: {error.strerror}") from None

    def send(self, kind: FrameKind, body: bytes = b"") -> None:
        """Write one frame."""
        self.write(Frame(kind=kind, length=len(body)).build() + body)

    def _wait(self, fd: int, what: int) -> None:
        poll = select.poll()
        poll.register(fd, what)
        if not poll.poll(self.silence * 1000):
            raise LinkLost(f"the other side was silent for {self.silence:g} s")

    def read(self, size: int) -> bytes:
        """Return *size* bytes, or fewer at the end of the link."""
        parts: list[bytes] = []
        while size:
            self._wait(self.reader, select.POLLIN)
            try:
                part = os.read(self.reader, min(size, 1 << 20))
            except OSError as error:
                raise LinkLost(f"the link broke: {error.strerror}") from None
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> tuple[int, bytes]:
        """Return kind and body of the next message, which is short."""
        try:
            frame = Frame.parse(self.read(Frame.SIZE))
        except WireError:
            raise LinkLost("the other side has closed the link") from None
        if frame.length > TEXT_MAX or frame.file or frame.offset:
            raise LinkLost(f"the other side sent a frame {frame.kind} of {frame.length} bytes")
        body = self.read(frame.length)
        if len(body) != frame.length:
            raise LinkLost("the other side has closed the link")
        return frame.kind, body

    def close(self) -> None:
        """Close the link; safe to call twice."""
        for fd in {self.reader, self.writer} - {-1}:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.reader = self.writer = -1
        if self._process is not None:
            deadline = time.monotonic() + 10
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
