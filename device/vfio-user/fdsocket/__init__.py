# SPDX-License-Identifier: Apache-2.0
"""A Unix stream socket that carries descriptors, on asyncio, independent of any protocol.

vhost-user and vfio-user both use such a socket.  Each has a session that does no I/O; this package
does the I/O for it::

    class Receiver(Protocol):
        def wanted(self) -> int: ...                  # bytes that may be read next, at least 1
        def received(self, data: bytes, fds: list[int]) -> None: ...   # owns fds
        def closed(self, error: str | None) -> None: ...   # exactly once; None: orderly end

    stream = FdStream(sock, receiver)       # owns sock from now on, makes it non-blocking
    stream.start()                          # begin to read, in the running loop
    stream.send(data, fds)                  # in order; owns fds, never blocks
    stream.receive(size, timeout)           # the next bytes, blocking, outside of the loop
    stream.close()                          # at once; drops output that is still queued
    stream.close_when_sent()                # close after all queued output was sent

Each descriptor has exactly one owner.  :meth:`FdStream.send` closes its descriptors once they were
sent or can no longer be sent.  The receiver closes those that ``received`` gets.

``wanted`` exists because each descriptor belongs to one message.  The kernel
returns them with the read that covers the first byte of their ``sendmsg``, but that read may begin
with bytes of an earlier message.  A receiver that asks for a header, then for the rest of that
message, never gets two messages in one read, so the owner of a descriptor is never ambiguous.

:meth:`FdStream.receive` is for a server that has sent its own request and cannot continue
without the answer: it flushes what is queued, waits, and returns at most *size* bytes with their
descriptors; the receiver does not see those bytes.  The loop is blocked meanwhile, so keep the
timeout short.

Create the socket with :func:`listen` (a stale path is removed only if nobody answers on
it), :func:`connect` or :func:`adopt` (a descriptor number that this process inherited);
:class:`Acceptor` accepts the connections of a listening socket.
"""

from __future__ import annotations

from fdsocket.acceptor import Acceptor
from fdsocket.endpoint import AddressInUse, adopt, connect, is_listening, listen
from fdsocket.stream import FdStream, Receiver
from fdsocket.transfer import (
    MAX_FDS,
    TruncatedError,
    close_fds,
    receive_some,
    send_some,
)

__all__ = (
    "MAX_FDS",
    "Acceptor",
    "AddressInUse",
    "FdStream",
    "Receiver",
    "TruncatedError",
    "adopt",
    "close_fds",
    "connect",
    "is_listening",
    "listen",
    "receive_some",
    "send_some",
)
