# SPDX-License-Identifier: Apache-2.0
"""The message header of vfio-user, the commands, and which way each of them goes.

From the *vfio-user Protocol Specification* in QEMU 11.1 (docs/interop/vfio-user.rst), sections
*Commands* and *Header*.  All data is in the byte order of the host, so every layout of this
package is native-endian without padding.
"""

from __future__ import annotations

import enum

from virtio_formats.declare import c
from virtio_formats.wire import WireStruct

__all__ = ("CLIENT_COMMANDS", "SERVER_COMMANDS", "Command", "Header", "HeaderFlags")


class Command(enum.IntEnum):
    """Command numbers; 14 is not assigned (it was DIRTY_PAGES in early drafts)."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


SERVER_COMMANDS = frozenset({Command.DMA_READ, Command.DMA_WRITE})
"""Commands that the server sends; a client that sends one breaks the protocol."""

CLIENT_COMMANDS = frozenset(Command) - SERVER_COMMANDS


class HeaderFlags(enum.IntFlag):
    """The *Flags* word of the header; the low four bits are the message type."""

    TYPE_MASK = 0xF
    TYPE_COMMAND = 0x0
    TYPE_REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20


class Header(WireStruct):
    """What every message begins with, 16 bytes.

    *size* counts the whole message with this header, in bytes; *error* is a UNIX errno, valid in
    a reply that has the ERROR flag, and may be zero even then.
    """

    id: int
    command: int
    size: int
    flags: int
    error: int

    SUBCON = c.Struct(
        "id" / c.Int16un,
        "command" / c.Int16un,
        "size" / c.Int32un,
        "flags" / c.Int32un,
        "error" / c.Int32un,
    )
