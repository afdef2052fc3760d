# SPDX-License-Identifier: Apache-2.0
"""The header that every vhost-user message begins with ("Header", vhost-user.rst, QEMU 11.1.3)."""

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
"""Bytes of payload that any message can have.

The standard gives no limit; its largest payload is "VIRTIO Shared Memory Region configuration"
with 2056 bytes.  A page holds that and leaves room, and bounds what a peer can make us keep.
"""

MAX_FDS_PER_MESSAGE = 8
"""Descriptors that one message carries at most: one for each of the eight regions of
"Multiple Memory regions description", and the bound of "Back-end communication"."""


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
