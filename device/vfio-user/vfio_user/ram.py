# SPDX-License-Identifier: Apache-2.0
"""The memory of a client: what a server maps, or reads and writes by messages."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable

from virtio_formats.vfio_user import Command, DmaAccess, DmaAccess32, Header, HeaderFlags

__all__ = ("Ram", "answer_dma", "message")


class Ram:
    """*size* bytes of client memory at DMA address *address*, in a memfd that can be mapped."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    def holds(self, address: int, count: int) -> bool:
        """Return whether all *count* bytes at *address* are here."""
        return self.address <= address and address + count <= self.address + self.size

    def read(self, address: int, count: int) -> bytes:
        """Return *count* bytes at *address*."""
        offset = address - self.address
        return self.bytes[offset : offset + count]

    def write(self, address: int, data: bytes) -> None:
        """Store *data* at *address*."""
        offset = address - self.address
        self.bytes[offset : offset + len(data)] = data

    def close(self) -> None:
        """Close the memory; a server that has it mapped keeps its mapping."""
        self.bytes.close()
        os.close(self.fd)


def message(
    command: int, payload: bytes = b"", *, msg_id: int = 1, flags: int = 0, error: int = 0
) -> bytes:
    """Return the bytes of one message."""
    size = Header.SIZE + len(payload)
    head = Header(id=msg_id, command=command, size=size, flags=flags, error=error)
    return head.build() + payload


def answer_dma(
    memory: Iterable[Ram],
    command: int,
    msg_id: int,
    payload: bytes,
    *,
    narrow: bool = False,
    error: int = 0,
) -> bytes:
    """Return the reply to a DMA_READ or DMA_WRITE, served from *memory*.

    *narrow*: with the layout of QEMU 10.1 (:mod:`vfio_user.remote`).  *error* refuses it.
    """
    layout = DmaAccess32 if narrow else DmaAccess
    request = layout.parse(payload[: layout.SIZE])
    ram = next((one for one in memory if one.holds(request.address, request.count)), None)
    if error or ram is None:
        failed = HeaderFlags.TYPE_REPLY | HeaderFlags.ERROR
        return message(command, msg_id=msg_id, flags=failed, error=error or errno.EFAULT)
    if command == Command.DMA_READ:
        data = ram.read(request.address, request.count)
        answer = payload[: layout.SIZE] + data + bytes(DmaAccess.SIZE - layout.SIZE)
    else:
        ram.write(request.address, payload[layout.SIZE :][: request.count])
        answer = b"" if narrow else payload[: DmaAccess.SIZE]
    return message(command, answer, msg_id=msg_id, flags=HeaderFlags.TYPE_REPLY)
