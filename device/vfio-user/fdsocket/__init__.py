# SPDX-License-Identifier: Apache-2.0
"""A Unix stream socket that carries descriptors, on asyncio.  It knows no protocol.

vhost-user and vfio-user both speak over such a socket; each has a sans-IO session, and this is
the shell around it::

    class Receiver(Protocol):
        def wanted(self) -> int: ...                  # bytes that may be read next, at least 1
        def received(self, data: bytes, fds: list[int]) -> None: ...   # takes the descriptors over
        def closed(self, error: str | None) -> None: ...   # exactly once; None: orderly end

    stream = FdStream(sock, receiver)       # takes the socket over, makes it non-blocking
    stream.start()                          # in a running loop: begin to read
    stream.send(data, fds)                  # ordered; takes the descriptors over, never blocks
    stream.receive(size, timeout)           # blocking: the next bytes, outside of the loop
    stream.close()                          # at once, output that is still queued is dropped
    stream.close_when_sent()                # the same after the queue has drained

Descriptors always have one owner.  Whatever is given to :meth:`FdStream.send` is closed once it
was sent or can no longer be sent; whatever is given to ``received`` is the receiver's.

``wanted`` exists because each descriptor belongs to one message.  The kernel hands
them over with the read that covers the first byte of the ``sendmsg`` they travelled with, but
that read may begin with bytes of an earlier one.  A receiver that asks for a header, then for the
rest of that message, never sees two messages in one read, so there is nothing to guess.

:meth:`FdStream.receive` is for a server that has sent its own request and cannot continue
without the answer: it flushes what is queued, waits, and returns at most *size* bytes with their
descriptors; the receiver does not see those bytes.  The loop stands still meanwhile, so keep the
timeout short.

Sockets to begin with come from :func:`listen` (a stale path is removed only if nobody answers on
it), :func:`connect` and :func:`adopt` (a descriptor number that this process inherited);
:class:`Acceptor` takes the connections of a listening one.
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
