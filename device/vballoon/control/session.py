# SPDX-License-Identifier: Apache-2.0
"""One client's side of a QMP conversation, without its socket.

The QEMU Machine Protocol (QEMU's ``docs/interop/qmp-spec.rst``): the server greets, the client
negotiates with ``qmp_capabilities``, then sends commands; replies come in order and echo the
command's ``id``; events come whenever they happen once negotiation is done.

Bytes in, requests out; answers and events in, bytes (and descriptors) out.  Nothing that a client
can send raises: what is not QMP is answered with an error, and what would make the session grow
without bound ends it.
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
"""Bytes of one message from a client.  The longest honest one holds a path of 4096."""
REQUESTS_MAX = 4096
"""Requests that may wait for an answer; a client that queues more is not reading replies."""

_STRUCTURE = re.compile(rb'[{}\[\]"\\]')
_GARBAGE_END = re.compile(rb"[\n{]")
_SPACE = b" \t\r\n\xff"
"""White space, and the byte with which some clients flush a server's parser."""


class CommandError(Exception):
    """An error for the client: ``GenericError`` or ``CommandNotFound``, and a sentence."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Request:
    """A command as it came: checked to be QMP, but the command and its arguments are not."""

    name: str
    arguments: dict[str, Any]
    id: Any = None
    has_id: bool = False


class QmpSession:
    """See the module's docstring.  *version* is (major, minor, micro)."""

    def __init__(self, version: tuple[int, int, int], package: str) -> None:
        self.negotiated = False
        self.ended = False
        """Nothing more will be read; close when the output is sent."""
        self._frames = _Frames()
        self._output: list[tuple[bytes, tuple[int, ...]]] = []
        major, minor, micro = version
        numbers = {"major": major, "minor": minor, "micro": micro}
        self._send(
            {
                "QMP": {
                    # the member's name is the protocol's: every client looks for it
                    "version": {"qemu": numbers, "package": package},
                    "capabilities": [],
                }
            }
        )

    def feed(self, data: bytes) -> list[Request]:
        """Take bytes of the client; returns the commands that are now to be run, in order."""
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
        """A request; None where it was answered here (errors, negotiation)."""
        try:
            message = Message(frame)
        except Exception:  # JSON, encoding, recursion: whatever the parser says, it is not QMP
            self._error(CommandError("the input is not a JSON object"))
            return None
        if not _has_finite_numbers(message):  # 1e999 would come back as Infinity, not JSON
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
            raise CommandError("no capability is offered, so none can be enabled")
        self.negotiated = True
        self.reply(request, {})

    def reply(self, request: Request, value: Any, fds: Sequence[int] = ()) -> None:
        """*request* succeeded with *value*; *fds* travel with the reply and are taken over."""
        self._send({"return": value} | _echo(request), tuple(fds))

    def fail(self, request: Request, error: CommandError) -> None:
        """*request* failed."""
        self._error(error, {"id": request.id} if request.has_id else {})

    def event(self, name: str, data: Mapping[str, Any], at: float | None = None) -> None:
        """Tell of an event (at UNIX time *at*, default now); nothing before negotiation."""
        if self.negotiated and not self.ended:
            seconds, fraction = divmod(time.time() if at is None else at, 1)
            stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
            message: dict[str, Any] = {"event": name, "timestamp": stamp}
            if data:
                message["data"] = dict(data)
            self._send(message)

    def end(self, desc: str) -> None:
        """Say why, and end the conversation."""
        self._error(CommandError(desc))
        self.ended = True

    def take_output(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """What is to be sent, with the descriptors that go along (the caller's from now on)."""
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
    """The command in *message*, whose members are those that QMP allows (qmp-spec, Commands)."""
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
    """Cuts a byte stream into JSON values; garbage ends with its line, or where one begins."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._depth = 0
        self._scanned = 0
        self._in_string = False
        self._escaped_at = -1

    def feed(self, data: bytes) -> list[bytes | None]:
        """The frames that *data* completes; a last None says that one grew too long."""
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
        """Where the first frame in the buffer ends; leading white space is dropped."""
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
        """Account for one character of structure; whether it closes the outermost value."""
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
