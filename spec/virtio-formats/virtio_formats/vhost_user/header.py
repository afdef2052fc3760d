# SPDX-License-Identifier: Apache-2.0
"""The header of every vhost-user message ("Header", vhost-user.rst, QEMU 11.1.3)."""

from __future__ import annotations

from enum import IntFlag

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "MAX_FDS_PER_MESSAGE",
    "MAX_PAYLOAD",
    "VERSION",
    "HeaderFlag",
    "VhostUserHeader",
)

VERSION = 1
"""The protocol version, in the lowest two bits of the flags ("Header")."""

MAX_PAYLOAD = 4096
"""Maximum size of a payload in bytes.

The standard gives no limit.  Its largest payload is "VIRTIO Shared Memory Region configuration"
with 2056 bytes.  A limit of one page bounds the memory that a peer can make the receiver allocate.
"""

MAX_FDS_PER_MESSAGE = 8
"""Maximum number of descriptors of a message: one for each of the eight regions of
"Multiple Memory regions description"; also the limit of "Back-end communication"."""


class HeaderFlag(IntFlag):
    """The bits of the flags field ("Header")."""

    VERSION_MASK = 0x3
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class VhostUserHeader(WireStruct):
    """Request type, flags, and the size of the payload in bytes ("Header")."""

    request: int
    flags: int
    size: int

    SUBCON = c.Struct("request" / c.Int32un, "flags" / c.Int32un, "size" / c.Int32un)
