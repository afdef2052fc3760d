# SPDX-License-Identifier: Apache-2.0
"""A blocking client of the control socket: one command, one reply.

Programs on asyncio can use ``qemu.qmp.QMPClient`` with this server.  This client also receives
the descriptors that come with a reply.  It imports neither asyncio nor NumPy, because those imports
take longer than most commands.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from vballoon.errors import UsageError

__all__ = ("ControlClient",)

GREETING_SECONDS = 5.0
"""Time limit for the greeting, which a control socket sends at once."""
NO_GREETING = (
    "no greeting; is it the socket that 'vballoon serve --control' names? "
    "The device's own socket (--vhost-user, --vfio-user) is for QEMU"
)

MESSAGE_MAX = 16 << 20
"""Maximum size in bytes of a message from the server; a memory map takes half a megabyte."""


class ControlClient:
    """A negotiated connection to the control socket at *path*; a context manager.

    *timeout* is in seconds and applies to each reply; the greeting has at most 5 s, and
    *no_greeting* is the error's text where it does not come.  Every method raises
    :class:`~vballoon.errors.UsageError` on failure.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout: float = 60.0,
        *,
        no_greeting: str | None = None,
    ) -> None:
        self._path = os.fspath(path)
        self._timeout = timeout
        self._buffer = bytearray()
        self.fds: list[int] = []
        """Descriptors that were received and not yet taken."""
        self.events: list[dict[str, Any]] = []
        """Events that arrived while a reply was awaited."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(self._path)
            greeting = self._receive(time.monotonic() + min(timeout, GREETING_SECONDS))
            if "QMP" not in greeting:
                raise UsageError(f"{self._path} is not a QMP socket")
            self.execute("qmp_capabilities")
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError) and no_greeting:
                raise UsageError(no_greeting) from None
            if isinstance(error, OSError):
                raise UsageError(f"{self._path}: {_why(error)}") from None
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run *command* and return its result.  Raise UsageError with the server's error text."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            return self._answer()
        except OSError as error:
            raise UsageError(f"{self._path}: {error.strerror or error}") from None

    def execute_fd(self, command: str) -> tuple[Any, int]:
        """Run *command* and return its result and the descriptor, which the caller closes."""
        result = self.execute(command)
        if not self.fds:
            raise UsageError(f"{self._path}: {command} returned no descriptor")
        return result, self.fds.pop()

    def export(self, directory: str | os.PathLike[str]) -> dict[str, int]:
        """Write the current skip bitmap to a new *directory*; return its pages by provenance.

        Raise UsageError with the server's error text, or where the directory cannot be written.
        """
        from vballoon.skipmap.export import receive_export  # imports NumPy

        answer, fd = self.execute_fd("get-skip-export-fd")
        try:
            return receive_export(fd, int(answer["manifest-offset"]), directory).pages
        finally:
            os.close(fd)

    def wait_event(self, name: str, timeout: float) -> dict[str, Any]:
        """Return the next event *name*.  Raise TimeoutError after *timeout* seconds."""
        deadline = time.monotonic() + timeout
        while True:
            for i, event in enumerate(self.events):
                if event.get("event") == name:
                    del self.events[: i + 1]
                    return event
            self.events.clear()
            self.events.append(self._receive(deadline))

    def _answer(self) -> Any:
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._receive(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                error = message["error"]
                raise UsageError(
                    str(error.get("desc", error) if isinstance(error, dict) else error)
                )
            self.events.append(message)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Return the next message of any kind."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MESSAGE_MAX:
                raise UsageError(f"{self._path}: the message exceeds {MESSAGE_MAX} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(None, "no answer in time")
            self._socket.settimeout(left)
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 8)
            self.fds += fds
            if not data:
                raise UsageError(f"{self._path}: the server closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise UsageError(f"{self._path} does not speak QMP")
        return message

    def close(self) -> None:
        """Close the connection and the descriptors that were not taken."""
        self._socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _why(error: OSError) -> str:
    """Explain why the connection failed and what to do about it."""
    if isinstance(error, TimeoutError):
        return NO_GREETING
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"{error.strerror}; is 'vballoon serve --control' running?"
    return error.strerror or str(error)
