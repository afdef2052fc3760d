# SPDX-License-Identifier: Apache-2.0
"""The QMP session of one client, without I/O.

The QEMU Machine Protocol (QEMU's ``docs/interop/qmp-spec.rst``): the server greets, the client
negotiates with ``qmp_capabilities``, then sends commands.  Replies come in order and echo the
command's ``id``.  After the negotiation, events are sent when they happen.

The session takes bytes and returns requests; it takes replies and events and returns bytes and
descriptors.  No input raises: input that is not QMP gets an error reply, and input that would make
the session grow without bound ends it.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qemu.qmp.message import Message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ("CommandError", "QmpSession", "Request")

MESSAGE_MAX = 64 << 10
"""Maximum size in bytes of a client's message; the longest useful one holds a path of 4096."""
REQUESTS_MAX = 4096
"""Maximum number of waiting requests; a client that queues more is not reading replies."""

_STRUCTURE = re.compile(rb'[{}\[\]"\\]')
_GARBAGE_END = re.compile(rb"[\n{]")
_SPACE = b" \t\r\n\xff"
"""White space, and the byte with which some clients flush a server's parser."""


class CommandError(Exception):
    """An error reply: the class ``GenericError`` or ``CommandNotFound``, and a sentence."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Request:
    """A command whose form was checked, but not its name and arguments."""

    name: str
    arguments: dict[str, Any]
    id: Any = None
    has_id: bool = False


class QmpSession:
    """The session of one client; *version* is (major, minor, micro)."""

    def __init__(self, version: tuple[int, int, int], package: str) -> None:
        self.negotiated = False
        self.ended = False
        """No more input is accepted; close the connection when the output is sent."""
        self._frames = _Frames()
        self._output: list[tuple[bytes, tuple[int, ...]]] = []
        major, minor, micro = version
        numbers = {"major": major, "minor": minor, "micro": micro}
        self._send(
            {
                "QMP": {
                    # QMP requires a member with this name, and clients read it
                    "version": {"qemu": numbers, "package": package},
                    "capabilities": [],
                }
            }
        )

    def feed(self, data: bytes) -> list[Request]:
        """Handle bytes from the client and return the commands to run, in order."""
        requests: list[Request] = []
        if self.ended:
            return requests
        for frame in self._frames.feed(data):
            if frame is None:
                self._error(CommandError(f"a message must not exceed {MESSAGE_MAX} bytes"))
                self.ended = True
                break
            request = self._parse(frame)
            if request is not None:
                requests.append(request)
        return requests

    def _parse(self, frame: bytes) -> Request | None:
        """Return the request in *frame*, or None if it was answered here (error, negotiation)."""
        try:
            message = Message(frame)
        except Exception:  # JSON, encoding or recursion: in any case not QMP
            self._error(CommandError("the input is not a JSON object"))
            return None
        if not _has_finite_numbers(message):  # 1e999 would be echoed as Infinity
            self._error(CommandError("the input holds a number that JSON cannot express"))
            return None
        try:
            request = _request(message)
            if request.name == "qmp_capabilities":
                self._negotiate(request)
                return None
            if not self.negotiated:
                raise CommandError(
                    "Expecting capabilities negotiation with 'qmp_capabilities'",
                    "CommandNotFound",
                )
        except CommandError as error:
            self._error(error, message)
            return None
        return request

    def _negotiate(self, request: Request) -> None:
        if self.negotiated:
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        wanted = request.arguments.get("enable", [])
        if wanted or set(request.arguments) - {"enable"}:
            raise CommandError(
                "no capability is offered; send 'qmp_capabilities' without arguments"
            )
        self.negotiated = True
        self.reply(request, {})

    def reply(self, request: Request, value: Any, fds: Sequence[int] = ()) -> None:
        """Answer *request* with *value*; take over *fds* and send them with the reply."""
        self._send({"return": value} | _echo(request), tuple(fds))

    def fail(self, request: Request, error: CommandError) -> None:
        """Answer *request* with *error*."""
        self._error(error, {"id": request.id} if request.has_id else {})

    def event(self, name: str, data: Mapping[str, Any], at: float | None = None) -> None:
        """Send an event (at UNIX time *at*, default now); before negotiation, send nothing."""
        if self.negotiated and not self.ended:
            seconds, fraction = divmod(time.time() if at is None else at, 1)
            stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
            message: dict[str, Any] = {"event": name, "timestamp": stamp}
            if data:
                message["data"] = dict(data)
            self._send(message)

    def end(self, desc: str) -> None:
        """Send the error *desc* and end the session."""
        self._error(CommandError(desc))
        self.ended = True

    def take_output(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Return the bytes to send, each with its descriptors, which the caller then owns."""
        output, self._output = self._output, []
        return output

    def _error(self, error: CommandError, message: Mapping[str, Any] | None = None) -> None:
        answer: dict[str, Any] = {"error": {"class": error.error_class, "desc": error.desc}}
        if message and "id" in message:
            answer["id"] = message["id"]
        self._send(answer)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self._output.append((bytes(Message(message)) + b"\r\n", fds))


def _has_finite_numbers(message: Message) -> bool:
    try:
        json.dumps(dict(message), allow_nan=False)
    except ValueError:
        return False
    return True


def _echo(request: Request) -> dict[str, Any]:
    return {"id": request.id} if request.has_id else {}


def _request(message: Mapping[str, Any]) -> Request:
    """Return the command in *message*.  Raise CommandError if invalid (qmp-spec, Commands)."""
    for key in message:
        if key not in ("execute", "arguments", "id"):
            raise CommandError(f"QMP input member '{key}' is unexpected")
    if "execute" not in message:
        raise CommandError("QMP input lacks member 'execute'")
    name, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(name, str):
        raise CommandError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise CommandError("QMP input member 'arguments' must be an object")
    return Request(name, arguments, message.get("id"), "id" in message)


class _Frames:
    """Split a byte stream into JSON values; garbage ends at a newline or where a value begins."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._depth = 0
        self._scanned = 0
        self._in_string = False
        self._escaped_at = -1

    def feed(self, data: bytes) -> list[bytes | None]:
        """Return the frames that *data* completes; a final None reports one that is too long."""
        self._buffer += data
        frames: list[bytes | None] = []
        while (end := self._frame_end()) is not None:
            frames.append(bytes(self._buffer[:end]))
            self._restart(end)
        if len(self._buffer) > MESSAGE_MAX or any(len(f or b"") > MESSAGE_MAX for f in frames):
            frames = [f for f in frames if len(f or b"") <= MESSAGE_MAX]
            frames.append(None)
        return frames

    def _restart(self, end: int) -> None:
        del self._buffer[:end]
        self._depth = self._scanned = 0
        self._in_string = False
        self._escaped_at = -1

    def _frame_end(self) -> int | None:
        """Return where the first frame in the buffer ends, after dropping leading white space."""
        if self._scanned == 0:
            blank = len(self._buffer) - len(self._buffer.lstrip(_SPACE))
            del self._buffer[:blank]
            if self._buffer and self._buffer[0] not in b"{[":
                end = _GARBAGE_END.search(self._buffer)
                return None if end is None else end.start() + (end.group() == b"\n")
        for found in _STRUCTURE.finditer(self._buffer, self._scanned):
            if self._structure(found.group(), found.start()):
                return found.end()
        self._scanned = len(self._buffer)
        return None

    def _structure(self, byte: bytes, at: int) -> bool:
        """Handle one structural character and return whether it closes the outermost value."""
        if self._in_string:
            if at == self._escaped_at:
                pass
            elif byte == b"\\":
                self._escaped_at = at + 1
            elif byte == b'"':
                self._in_string = False
        elif byte == b'"':
            self._in_string = True
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
            return self._depth == 0
        return False
