# SPDX-License-Identifier: Apache-2.0
"""Answer a client that connects while another one is being served.

Left waiting, it would wait for the answer to its VERSION command, and QEMU holds its global lock
meanwhile: the whole virtual machine would stand still.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket

import fdsocket
from vfio_user.stream import HEADER
from virtio_formats.vfio_user import Header, HeaderFlags

__all__ = ("Refusal", "hung_up")

_SECONDS = 5.0
"""How long a refused client may take to send its first message."""
_SIZE_MAX = 1 << 16
"""Bytes of that message that are read before the answer, so that the client can send it all."""
_ERROR = int(HeaderFlags.TYPE_REPLY | HeaderFlags.ERROR)


def hung_up(fd: int) -> bool:
    """Return whether the other end of the socket *fd* is closed, even if bytes are unread."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


class Refusal:
    """Reads one command from *sock*, answers it with EBUSY, and closes the connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._data = b""
        self._stream = fdsocket.FdStream(sock, self)
        self._stream.start()
        self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._stream.close)

    @property
    def is_open(self) -> bool:
        """Return whether the client is still there."""
        return self._stream.is_open

    def close(self) -> None:
        """Close the connection at once."""
        self._stream.close()

    def wanted(self) -> int:
        """See :class:`fdsocket.Receiver`."""
        return max(1, self._due() - len(self._data))

    def _due(self) -> int:
        if len(self._data) < Header.SIZE:
            return Header.SIZE
        size: int = HEADER.unpack_from(self._data)[2]
        return min(max(size, Header.SIZE), _SIZE_MAX)

    def received(self, data: bytes, fds: list[int]) -> None:
        """See :class:`fdsocket.Receiver`."""
        fdsocket.close_fds(fds)
        self._data += data
        if len(self._data) < Header.SIZE or len(self._data) < self._due():
            return
        msg_id, command = HEADER.unpack_from(self._data)[:2]
        self._stream.send(HEADER.pack(msg_id, command, Header.SIZE, _ERROR, errno.EBUSY))
        self._stream.close_when_sent()

    def closed(self, error: str | None) -> None:
        """See :class:`fdsocket.Receiver`."""
        self._timer.cancel()
