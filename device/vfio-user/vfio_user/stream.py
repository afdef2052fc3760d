# SPDX-License-Identifier: Apache-2.0
"""Cut a byte stream with descriptors into messages.

Descriptors that arrive with some bytes belong to the last message that begins in those bytes, or
to the one that they continue: Linux ends a read after the bytes that descriptors came with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from virtio_formats.vfio_user import Header, HeaderFlags

__all__ = ("HEADER", "Message", "Splitter", "close_all")

HEADER = Header.flat_struct()
"""The header's declaration as one :mod:`struct` format: every message passes through here."""

_TYPE = int(HeaderFlags.TYPE_MASK)
_COMMAND, _REPLY = int(HeaderFlags.TYPE_COMMAND), int(HeaderFlags.TYPE_REPLY)
_NO_REPLY = int(HeaderFlags.NO_REPLY)


@dataclass(slots=True)
class Message:
    """A complete message.  What a handler leaves in *fds* is closed."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def is_reply(self) -> bool:
        """Return whether it answers a command."""
        return self.flags & _TYPE == _REPLY

    @property
    def is_command(self) -> bool:
        """Return whether it is a command; the other types are not assigned."""
        return self.flags & _TYPE == _COMMAND

    @property
    def wants_reply(self) -> bool:
        """Return whether the sender waits for an answer."""
        return not self.flags & _NO_REPLY

    def close(self) -> None:
        """Close the descriptors that no handler took."""
        close_all(self.fds)


class Splitter:
    """Cuts one direction of a connection; holds what is not yet a whole message.

    *limit* is the size of the largest message in bytes, its header included.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.malformed: tuple[Message, int] | None = None
        """A header of impossible size, and that size; nothing after it is read."""
        self._buffer = bytearray()
        self._early: list[int] = []

    @property
    def early(self) -> int:
        """Return how many descriptors belong to a message that is not complete yet."""
        return len(self._early)

    def feed(self, data: bytes, fds: list[int]) -> list[Message]:
        """Return the messages that *data* completes; *fds* are taken over."""
        self._buffer += data
        messages = self._cut()
        if messages and not self._buffer:
            messages[-1].fds += fds
        else:
            self._early += fds
        if self.malformed is not None:
            self.close()
        return messages

    def _cut(self) -> list[Message]:
        messages: list[Message] = []
        buffer, start = self._buffer, 0
        while self.malformed is None and len(buffer) - start >= Header.SIZE:
            msg_id, command, size, flags, error = HEADER.unpack_from(buffer, start)
            if not Header.SIZE <= size <= self.limit:
                self.malformed = Message(msg_id, command, flags, error, b""), size
                break
            if len(buffer) - start < size:
                break
            payload = bytes(buffer[start + Header.SIZE : start + size])
            messages.append(Message(msg_id, command, flags, error, payload, self._early))
            self._early = []
            start += size
        del buffer[:start]
        return messages

    def close(self) -> None:
        """Forget what is incomplete, and close its descriptors."""
        close_all(self._early)
        self._buffer.clear()


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    for fd in fds:
        os.close(fd)
    fds.clear()
