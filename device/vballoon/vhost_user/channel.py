# SPDX-License-Identifier: Apache-2.0
"""The back-end's own requests ("Back-end communication", vhost-user.rst, QEMU 11.1.3).

The front-end hands over a socket (SET_BACKEND_REQ_FD); requests go out on it, and answers come
back if they were asked for.  The answers are never waited for: a front-end that is waiting for
*our* answer to a message on the main socket (QEMU does, with its other sockets unread) would wait
for ever.
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
"""Requests that wait for their answers, at most; while there are so many, configuration changes
are sent once the front-end has answered (it reads the newest state in any case)."""

_HEADER = VhostUserHeader.SIZE
_REPLY = _HEADER + VhostUserU64.SIZE


class BackendChannel:
    """Sans-IO: requests out, answers in.

    With *need_reply* each request asks for an answer (REPLY_ACK must have been negotiated).
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
        """Send CONFIG_CHANGE_MSG, or once the outstanding requests have been answered."""
        if len(self._waiting) >= MAX_OUTSTANDING:
            self._change_due = True
            return
        self.request(BackendRequest.CONFIG_CHANGE_MSG)

    def request(
        self, request: BackendRequest, payload: bytes = b"", fds: list[int] | None = None
    ) -> None:
        """Send a request; *fds* (BACKEND_SEND_FD) are taken over."""
        flags = VERSION | (HeaderFlag.NEED_REPLY if self._need_reply else 0)
        header = VhostUserHeader(request=request, flags=flags, size=len(payload))
        self._output.append((header.build() + payload, fds or []))
        self.sent += 1
        if self._need_reply:
            self._waiting.append(request)

    def take_output(self) -> list[tuple[bytes, list[int]]]:
        """Messages to send, with their descriptors."""
        output, self._output = self._output, []
        return output

    def wanted(self) -> int:
        """How many bytes complete the answer under way."""
        return _REPLY - len(self._buffer)

    def feed(self, data: bytes, fds: list[int] | None = None) -> None:
        """Take in answers.

        Raises :class:`~vballoon.errors.ProtocolError` for anything that is not one; the channel
        is to be closed then.  Descriptors are never due here and are closed.
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
