# SPDX-License-Identifier: Apache-2.0
"""Client memory by message: DMA_READ and DMA_WRITE, sent by the server.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DMA_READ`` and ``VFIO_USER_DMA_WRITE``.

**Two layouts.**  The specification gives *count* 64 bits, so that data begins at offset 16 of the
payload; QEMU 11.1.3 follows it.  QEMU's sources of 10.1 declare it with 32 bits, so that data
begins at offset 12, in a message that still has the size of the other form.  Nothing in the
negotiation separates them, but the first data that is not zero does: with the 64-bit form, bytes
12 to 15 are the upper half of a count below 4 GiB, so they are zero; with the 32-bit form, the
last four bytes are padding, so they are zero.  Until a reply has shown which it is, both are tried.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Sequence

from vfio_user.errors import DmaError
from vfio_user.link import Link
from vfio_user.state import require
from vfio_user.stream import Message
from virtio_formats.vfio_user import Command, DmaAccess, DmaAccess32, HeaderFlags

__all__ = ("DmaRequests", "Layout")

_WIDE, _NARROW = DmaAccess.SIZE, DmaAccess32.SIZE
_PAD = _WIDE - _NARROW
_ABANDONED_MAX = 1024
"""Requests given up that the client may still answer; one that owes more will not."""
_PROBES = 4
"""How often memory may change under a probe before the layout is taken as the specification's."""


class Layout(enum.Enum):
    """Where a client has the data of these messages."""

    UNKNOWN = 0
    WIDE = _WIDE
    NARROW = _NARROW


class DmaRequests:
    """The server's own commands on one connection, and the answers to them.

    *wait(done)* lets the driver exchange messages until *done()* is true; *idle()* is called
    when the last answer that was waited for has arrived or was given up.
    """

    def __init__(
        self,
        link: Link,
        wait: Callable[[Callable[[], bool]], None] | None,
        idle: Callable[[], None],
    ) -> None:
        self.layout = Layout.UNKNOWN
        self.sent = 0
        self._link = link
        self._wait = wait
        self._idle = idle
        self._next_id = 0
        self._pending: dict[int, Message | int | None] = {}
        self._abandoned: set[int] = set()

    @property
    def owed(self) -> tuple[int, ...]:
        """Return the identifiers of messages that the client may still answer."""
        waiting = {msg_id for msg_id, reply in self._pending.items() if reply is None}
        return tuple(sorted(self._abandoned | waiting))

    @property
    def next_id(self) -> int:
        """Return the identifier that was given last."""
        return self._next_id

    def restore(self, layout: int, next_id: int, owed: Sequence[int]) -> None:
        """Continue to number messages where another process stopped.

        Raise :class:`~vfio_user.errors.RequestError` EINVAL for numbers that cannot be.
        """
        require(layout in {one.value for one in Layout}, f"layout {layout}")
        require(0 <= next_id <= 0xFFFF, f"message identifier {next_id}")
        require(len(set(owed)) == len(owed) <= _ABANDONED_MAX + 1, "messages that are owed")
        require(all(0 <= one <= 0xFFFF for one in owed), "messages that are owed")
        self.layout, self._next_id, self._abandoned = Layout(layout), next_id, set(owed)

    @property
    def busy(self) -> bool:
        """Whether an answer is being waited for."""
        return bool(self._pending)

    def dma_read(self, addr: int, size: int) -> bytes:
        """*size* bytes at DMA address *addr*; raises :class:`~vfio_user.errors.DmaError`."""
        limit = self._limit()
        parts = [self._read(addr + done, min(limit, size - done)) for done in range(0, size, limit)]
        return b"".join(parts)

    def dma_write(self, addr: int, data: bytes) -> None:
        """Store *data* at DMA address *addr*; raises :class:`~vfio_user.errors.DmaError`."""
        limit = self._limit()
        for done in range(0, len(data), limit):
            self._write(addr + done, data[done : done + limit])

    def answer(self, message: Message) -> bool:
        """Take a reply; False if nobody waits for it."""
        if message.id in self._abandoned:
            self._abandoned.discard(message.id)
            return True
        if message.id not in self._pending or self._pending[message.id] is not None:
            return False
        self._pending[message.id] = message
        return True

    def abort(self, error: int) -> None:
        """No answer will come, or none is wanted: whoever waits gets *error* (an errno)."""
        for msg_id, reply in self._pending.items():
            if reply is None:
                self._pending[msg_id] = error
                self._abandoned.add(msg_id)

    # -- one message each -------------------------------------------------------------------------

    def _read(self, addr: int, size: int) -> bytes:
        body = self._read_body(addr, size)
        for _ in range(_PROBES):
            self._learn(body)
            if self.layout is not Layout.UNKNOWN or not any(body):
                break
            self._probe(addr, body)
        start = _PAD if self.layout is not Layout.NARROW else 0
        return body[start : start + size]

    def _read_body(self, addr: int, size: int) -> bytes:
        """Return the reply's bytes from offset 12 on: *size* bytes, with four zeros around."""
        request = DmaAccess(address=addr, count=size).build()
        reply = self._transact(Command.DMA_READ, request)
        if len(reply.payload) != _WIDE + size:
            raise DmaError(errno.EPROTO, f"DMA_READ answered with {len(reply.payload)} bytes")
        found = DmaAccess32.parse(reply.payload[:_NARROW])
        if (found.address, found.count) != (addr, size & 0xFFFFFFFF):
            raise DmaError(errno.EPROTO, "DMA_READ answered for another range")
        return reply.payload[_NARROW:]

    def _learn(self, body: bytes) -> None:
        if self.layout is Layout.UNKNOWN:
            if any(body[:_PAD]):
                self.layout = Layout.NARROW
            elif any(body[-_PAD:]):
                self.layout = Layout.WIDE

    def _probe(self, addr: int, body: bytes) -> None:
        """Ask for single bytes where *body* has its first that is not zero."""
        first = next(position for position, byte in enumerate(body) if byte)
        for offset in (first - _PAD, first):  # where it is in the 64-bit form, in the 32-bit form
            if self.layout is Layout.UNKNOWN:
                self._learn(self._read_body(addr + offset, 1))

    def _write(self, addr: int, data: bytes) -> None:
        assumed = self.layout
        self._write_as(assumed, addr, data)
        if assumed is not Layout.UNKNOWN or not any(data):
            return
        # Taken for the 32-bit form, the data was four zeros and then what fits of *data*.
        try:
            if self._read(addr, len(data)) == data:
                return
        except DmaError as error:
            if error.errno in (errno.ENOTCONN, errno.ETIMEDOUT, errno.ECANCELED):
                raise
            return  # memory that the device may only write: take the client to follow the text
        guess = Layout.NARROW if self.layout is Layout.UNKNOWN else self.layout
        self._write_as(guess, addr, data)
        self._read(addr, len(data))

    def _write_as(self, layout: Layout, addr: int, data: bytes) -> None:
        if layout is Layout.NARROW:
            payload = DmaAccess32(address=addr, count=len(data)).build() + data + bytes(_PAD)
        else:
            payload = DmaAccess(address=addr, count=len(data)).build() + data
        self._transact(Command.DMA_WRITE, payload)

    def _transact(self, command: Command, payload: bytes) -> Message:
        if not self._link.is_open or self._wait is None:
            raise DmaError(errno.ENOTCONN, "no client to ask")
        msg_id = self._new_id()
        self._pending[msg_id] = None
        self.sent += 1
        self._link.send(command, payload, [], msg_id=msg_id, flags=0, twin=self._link.twin)
        try:
            self._wait(lambda: self._pending[msg_id] is not None)
        except TimeoutError:
            self._abandoned.add(msg_id)
            raise DmaError(errno.ETIMEDOUT, f"{command.name} was not answered") from None
        except ConnectionError as error:
            raise DmaError(errno.ENOTCONN, f"{command.name}: {error}") from None
        finally:
            reply = self._pending.pop(msg_id)
            if not self.busy:
                self._idle()
        return _checked(command, reply)

    def _limit(self) -> int:
        limit = self._link.transfer_limit if self._link.client is not None else 0
        if limit <= 0:
            raise DmaError(errno.ENOTCONN, "the client did not negotiate max_data_xfer_size")
        return limit

    def _new_id(self) -> int:
        # An id that may still be answered is not used again.
        if len(self._abandoned) > _ABANDONED_MAX:
            self._link.close("the client answers no DMA message")
            raise DmaError(errno.ENOTCONN, "no client to ask")
        while True:
            self._next_id = (self._next_id + 1) & 0xFFFF
            if self._next_id not in self._pending and self._next_id not in self._abandoned:
                return self._next_id


def _checked(command: Command, reply: Message | int | None) -> Message:
    if not isinstance(reply, Message):
        raise DmaError(reply or errno.ECANCELED, f"{command.name} cancelled")
    if reply.flags & HeaderFlags.ERROR:
        raise DmaError(reply.error or errno.EIO, f"the client refused {command.name}")
    if reply.command != command:
        raise DmaError(errno.EPROTO, f"{command.name} answered as command {reply.command}")
    return reply
