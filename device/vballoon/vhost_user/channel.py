# SPDX-License-Identifier: Apache-2.0
"""The back-end's own requests ("Back-end communication", vhost-user.rst, QEMU 11.1.3).

The front-end sends a socket (SET_BACKEND_REQ_FD).  Requests are sent on it, and replies received if
they were requested.  The back-end never blocks on a reply: a front-end that blocks on the reply to
a message on the main socket, as QEMU does, reads no other socket, and both would wait forever.
"""

from __future__ import annotations

import logging
from collections import deque

from fdsocket import close_fds
from vballoon.errors import ProtocolError
from virtio_formats.vhost_user import (
    VERSION,
    BackendRequest,
    HeaderFlag,
    VhostUserHeader,
    VhostUserU64,
)

__all__ = ("MAX_OUTSTANDING", "BackendChannel")

log = logging.getLogger(__name__)

MAX_OUTSTANDING = 64
"""Maximum number of requests without a reply.  At the maximum, a configuration change is sent after
the next reply; the front-end then reads the newest configuration anyway."""

_HEADER = VhostUserHeader.SIZE
_REPLY = _HEADER + VhostUserU64.SIZE


class BackendChannel:
    """The channel without I/O: requests out, replies in.

    With *need_reply* each request asks for a reply (REPLY_ACK must have been negotiated).
    ``sent``, ``answered`` and ``failed`` count requests.
    """

    def __init__(self, *, need_reply: bool = False) -> None:
        self._need_reply = need_reply
        self._waiting: deque[int] = deque()
        self._buffer = bytearray()
        self._output: list[tuple[bytes, list[int]]] = []
        self._change_due = False
        self.sent = self.answered = self.failed = 0

    def config_changed(self) -> None:
        """Send CONFIG_CHANGE_MSG now, or after the next reply if too many requests are pending."""
        if len(self._waiting) >= MAX_OUTSTANDING:
            self._change_due = True
            return
        self.request(BackendRequest.CONFIG_CHANGE_MSG)

    def request(
        self, request: BackendRequest, payload: bytes = b"", fds: list[int] | None = None
    ) -> None:
        """Send a request and take ownership of *fds* (BACKEND_SEND_FD)."""
        flags = VERSION | (HeaderFlag.NEED_REPLY if self._need_reply else 0)
        header = VhostUserHeader(request=request, flags=flags, size=len(payload))
        self._output.append((header.build() + payload, fds or []))
        self.sent += 1
        if self._need_reply:
            self._waiting.append(request)

    def take_output(self) -> list[tuple[bytes, list[int]]]:
        """Return and remove the messages to send, with their descriptors."""
        output, self._output = self._output, []
        return output

    def wanted(self) -> int:
        """Return how many bytes are missing from the current reply."""
        return _REPLY - len(self._buffer)

    def feed(self, data: bytes, fds: list[int] | None = None) -> None:
        """Handle replies.

        Raise :class:`~vballoon.errors.ProtocolError` for any other input; the caller then closes
        the channel.  Close *fds*, because a reply has no descriptors.
        """
        close_fds(fds or [])
        self._buffer += data
        while len(self._buffer) >= _REPLY:
            self._answer(
                VhostUserHeader.parse(self._buffer[:_HEADER]),
                VhostUserU64.parse(self._buffer[_HEADER:_REPLY]).u64,
            )
            del self._buffer[:_REPLY]

    def _answer(self, header: VhostUserHeader, value: int) -> None:
        expected = self._waiting.popleft() if self._waiting else None
        if header.request != expected or header.flags != VERSION | HeaderFlag.REPLY:
            raise ProtocolError("backend-reply", f"to {header.request}, expected {expected}")
        if header.size != VhostUserU64.SIZE:
            raise ProtocolError("backend-reply", f"{header.size} bytes")
        self.answered += 1
        if value:
            self.failed += 1
            log.warning("the front-end failed %s: %d", BackendRequest(header.request).name, value)
        if self._change_due:
            self._change_due = False
            self.config_changed()
