# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space: bytes, which of their bits can be written, and the capability list.

A write changes the bits that the mask allows and no other; a client (QEMU forwards every write of
the guest) gets no error for writing a read-only register, because no PCI device gives one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from vfio_user.errors import RequestError, UsageError
from vfio_user.regions import Region
from virtio_formats.pci import (
    CONFIG_SIZE,
    EXPRESS_CONFIG_SIZE,
    HEADER_SIZE,
    BarFlags,
    Command,
    ExtendedCapabilityHeader,
    Status,
    Type0Header,
)

__all__ = ("ConfigSpace",)

_COMMAND, _STATUS, _BARS, _ROM, _CAP_LIST, _INT_LINE = 0x04, 0x06, 0x10, 0x30, 0x34, 0x3C
_COMMAND_BITS = Command.IO | Command.MEMORY | Command.MASTER | Command.PARITY | Command.SERR
_COMMAND_BITS |= Command.INTX_DISABLE

_IDENTITY = ((0x00, 0x04), (0x08, 0x0C), (0x2C, 0x30))
"""Vendor and device, revision and class, subsystem."""

Hook = Callable[[int, int], None]


class ConfigSpace:
    """The configuration space of one function, 256 bytes or, for PCI Express, 4096.

    *class_code* is 24 bits (base class, subclass, programming interface).
    """

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        revision_id: int = 0,
        class_code: int = 0xFF0000,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        express: bool = True,
        interrupt_pin: int = 0,
    ) -> None:
        self.size = EXPRESS_CONFIG_SIZE if express else CONFIG_SIZE
        self.data = bytearray(self.size)
        self._mask = bytearray(self.size)
        header = replace(
            Type0Header.parse(bytes(HEADER_SIZE)),
            vendor_id=vendor_id,
            device_id=device_id,
            revision_id=revision_id,
            prog_if=class_code & 0xFF,
            subclass=class_code >> 8 & 0xFF,
            base_class=class_code >> 16,
            subsystem_vendor_id=subsystem_vendor_id or vendor_id,
            subsystem_id=subsystem_id or device_id,
            interrupt_pin=interrupt_pin,
        )
        self.data[:HEADER_SIZE] = header.build()
        self._reset_values: bytes | None = None
        self._next = HEADER_SIZE
        self._last = _CAP_LIST
        self._next_extended = CONFIG_SIZE
        self._claimed: list[tuple[int, int]] = []  # by capabilities
        self._last_extended = 0
        self._before_read: list[tuple[int, int, Hook]] = []
        self._after_write: list[tuple[int, int, Hook]] = []
        self._allow(_COMMAND, int(_COMMAND_BITS), 2)
        self._allow(_INT_LINE, 0xFF, 1)
        self._allow(0x0C, 0xFF, 1)  # cache line size: writable, without effect

    # -- building ---------------------------------------------------------------------------------

    def add_bar(self, index: int, region: Region) -> None:
        """Show *region* as BAR *index*, sized and typed.

        Raises :class:`~vfio_user.errors.UsageError` for a size that is no power of two, or a
        64-bit BAR without room for its upper half.
        """
        size, kind = region.size, region.bar
        least = 4 if kind & BarFlags.IO else 16
        if size < least or size & (size - 1):
            raise UsageError(f"BAR {index} of {size} bytes")
        wide = bool(kind & BarFlags.MEMORY_64)
        if index + wide > 5 or (not wide and size > 1 << 31):
            raise UsageError(f"BAR {index} has no room for its address")
        offset, width = _BARS + 4 * index, 8 if wide else 4
        if any(self._mask[offset : offset + width]):
            raise UsageError(f"BAR {index} overlaps another")
        flags = int(kind)
        self.data[offset : offset + 4] = flags.to_bytes(4, "little")
        everything = (1 << 8 * width) - 1
        self._allow(offset, everything & ~(size - 1), width)

    def add_rom(self, region: Region) -> None:
        """Show *region* as the expansion ROM, sized; its enable bit can be written.

        Raise :class:`~vfio_user.errors.UsageError` for a size that is no power of two, or below
        2 KiB.
        """
        size = region.size
        if size < 2048 or size & (size - 1) or size > 1 << 31:
            raise UsageError(f"an expansion ROM of {size} bytes")
        self._allow(_ROM, (0xFFFFFFFF & ~(size - 1)) | 1, 4)

    def add_capability(self, body: bytes, writable: bytes = b"", *, at: int | None = None) -> int:
        """Append a capability, header included; return its offset.

        *writable* is the mask of bits that can be written, from the capability's start.  *at* is
        an offset of one's own choice.  Raise :class:`~vfio_user.errors.UsageError` when the space
        is full, or used at that offset.
        """
        offset = self._next if at is None else at
        end = offset + len(body)
        if len(body) < 2 or end > CONFIG_SIZE or len(writable) > len(body):
            raise UsageError(f"no room for a capability of {len(body)} bytes")
        self._claim(offset, end, HEADER_SIZE)
        self.data[offset:end] = body
        self.data[offset + 1] = 0
        self._mask[offset : offset + len(writable)] = writable
        self._mask[offset : offset + 2] = b"\0\0"
        self.data[self._last] = offset
        self._last = offset + 1
        self.data[_STATUS] |= Status.CAP_LIST
        self._next = max(self._next, end + -end % 4)
        return offset

    def add_extended_capability(
        self,
        cap_id: int,
        body: bytes,
        *,
        version: int = 1,
        writable: bytes = b"",
        at: int | None = None,
    ) -> int:
        """Append an extended capability (*body* follows its header); return its offset.

        *writable* is the mask of the body's bits that can be written.  *at* is an offset of
        one's own choice; the first one must be at 256.  Raise
        :class:`~vfio_user.errors.UsageError` in conventional configuration space, and when it is
        full or used at that offset.
        """
        offset = self._next_extended if at is None else at
        start = offset + ExtendedCapabilityHeader.SIZE
        end = start + len(body)
        if not self._last_extended and offset != CONFIG_SIZE:
            raise UsageError(f"the first extended capability at {offset:#x}")
        if end > self.size or len(writable) > len(body):
            raise UsageError(f"no room for an extended capability of {len(body)} bytes")
        self._claim(offset, end, CONFIG_SIZE)
        self._set_extended(offset, cap_id, version, 0)
        self.data[start:end] = body
        self._mask[start : start + len(writable)] = writable
        if self._last_extended:
            last, word = self._last_extended, self.long(self._last_extended)
            self._set_extended(last, word & 0xFFFF, word >> 16 & 0xF, offset)
        self._last_extended = offset
        self._next_extended = max(self._next_extended, end + -end % 4)
        return offset

    def _claim(self, start: int, end: int, least: int) -> None:
        if start < least or start % 4 or any(start < b and a < end for a, b in self._claimed):
            raise UsageError(f"no room for a capability at {start:#x}")
        self._claimed.append((start, end))

    def _set_extended(self, offset: int, cap_id: int, version: int, following: int) -> None:
        word = cap_id | version << 16 | following << 20
        header = ExtendedCapabilityHeader(word=word).build()
        self.data[offset : offset + len(header)] = header

    def on_read(self, offset: int, size: int, hook: Hook) -> None:
        """Call *hook(offset, size)* before a read that touches these bytes."""
        self._before_read.append((offset, offset + size, hook))

    def on_write(self, offset: int, size: int, hook: Hook) -> None:
        """Call *hook(offset, size)* (of the write) after a write that touches these bytes."""
        self._after_write.append((offset, offset + size, hook))

    def _allow(self, offset: int, bits: int, width: int) -> None:
        self._mask[offset : offset + width] = bits.to_bytes(width, "little")

    # -- use --------------------------------------------------------------------------------------

    @property
    def command(self) -> Command:
        """The Command register."""
        return Command(self.word(_COMMAND))

    @property
    def interrupt_status(self) -> bool:
        """The Interrupt Status bit of the Status register."""
        return bool(self.data[_STATUS] & Status.INTERRUPT)

    @interrupt_status.setter
    def interrupt_status(self, on: bool) -> None:
        if on:
            self.data[_STATUS] |= Status.INTERRUPT
        else:
            self.data[_STATUS] &= ~int(Status.INTERRUPT) & 0xFF

    def word(self, offset: int) -> int:
        """16 bits at *offset*."""
        return int.from_bytes(self.data[offset : offset + 2], "little")

    def long(self, offset: int) -> int:
        """32 bits at *offset*."""
        return int.from_bytes(self.data[offset : offset + 4], "little")

    def capabilities(self) -> list[tuple[int, int]]:
        """Return the capability list as (id, offset), in order."""
        found: list[tuple[int, int]] = []
        offset = self.data[_CAP_LIST]
        while offset and len(found) < CONFIG_SIZE // 4:
            found.append((self.data[offset], offset))
            offset = self.data[offset + 1]
        return found

    def extended_capabilities(self) -> list[tuple[int, int]]:
        """Return the list of extended capabilities as (id, offset), in order."""
        found: list[tuple[int, int]] = []
        offset = CONFIG_SIZE if self.size > CONFIG_SIZE else 0
        while offset and self.long(offset) and len(found) < self.size // 4:
            found.append((self.word(offset), offset))
            offset = self.long(offset) >> 20
        return found

    def read(self, offset: int, count: int) -> bytes:
        """*count* bytes at *offset*; raises :class:`RequestError` outside of the space."""
        self._check(offset, count)
        for start, end, hook in self._before_read:
            if offset < end and offset + count > start:
                hook(offset, count)
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Store what can be written; raises :class:`RequestError` outside of the space."""
        self._check(offset, len(data))
        if self._reset_values is None:
            self.seal()
        for position, value in enumerate(data, offset):
            mask = self._mask[position]
            self.data[position] = self.data[position] & ~mask | value & mask
        for start, end, hook in self._after_write:
            if offset < end and offset + len(data) > start:
                hook(offset, len(data))

    def seal(self) -> None:
        """Make the current contents the values that :meth:`reset` restores."""
        self._reset_values = bytes(self.data)

    def reset(self) -> None:
        """Back to the values before the first write."""
        if self._reset_values is not None:
            self.data[:] = self._reset_values

    def check(self, image: bytes) -> None:
        """Raise :class:`RequestError` EINVAL for an *image* of another size or another device."""
        if len(image) != self.size:
            raise RequestError(errno.EINVAL, f"{len(image)} bytes of configuration space")
        if any(image[start:end] != self.data[start:end] for start, end in _IDENTITY):
            raise RequestError(errno.EINVAL, "configuration space of another device")

    def restore(self, image: bytes) -> None:
        """Take the bits over that can be written, from *image* of the whole space.  No hook runs.

        Raise :class:`RequestError` EINVAL as :meth:`check` does.
        """
        self.check(image)
        if self._reset_values is None:
            self.seal()
        for at, (mask, value) in enumerate(zip(self._mask, image, strict=True)):
            self.data[at] = self.data[at] & ~mask | value & mask

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or offset > self.size or count > self.size - offset:
            raise RequestError(errno.EINVAL, f"configuration space {offset:#x}+{count:#x}")
