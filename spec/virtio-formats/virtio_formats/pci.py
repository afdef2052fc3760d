# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space: the type 0 header and standard capabilities.

Labels: PCI Local Bus Specification 3.0, sections 6.1, 6.2, 6.7, 6.8.2 (header, list, MSI-X);
PCI Bus Power Management Interface Specification 1.2, section 3.2; PCI Express Base
Specification 3.1, section 7.8.  Field names follow ``<linux/pci_regs.h>``.  Little-endian.
"""

from __future__ import annotations

import enum

from virtio_formats.declare import c
from virtio_formats.wire import WireStruct

__all__ = (
    "CONFIG_SIZE",
    "EXPRESS_CONFIG_SIZE",
    "HEADER_SIZE",
    "BarFlags",
    "CapId",
    "CapabilityHeader",
    "Command",
    "ExpressCapability",
    "ExtendedCapabilityHeader",
    "MsiCapability",
    "MsiControl",
    "MsixCapability",
    "MsixControl",
    "MsixTableEntry",
    "PowerManagementCapability",
    "Status",
    "Type0Header",
)

HEADER_SIZE = 64
"""Bytes of the predefined header; capabilities follow it."""
CONFIG_SIZE = 256
EXPRESS_CONFIG_SIZE = 4096


class Command(enum.IntFlag):
    """The Command register (offset 4)."""

    IO = 1 << 0
    MEMORY = 1 << 1
    MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


class Status(enum.IntFlag):
    """The Status register (offset 6)."""

    INTERRUPT = 1 << 3
    CAP_LIST = 1 << 4


class BarFlags(enum.IntFlag):
    """The low bits of a base address register."""

    MEMORY_32 = 0
    IO = 1 << 0
    MEMORY_64 = 1 << 2
    PREFETCH = 1 << 3


class CapId(enum.IntEnum):
    """Capability IDs."""

    PM = 0x01
    MSI = 0x05
    VENDOR = 0x09
    EXPRESS = 0x10
    MSIX = 0x11


class Type0Header(WireStruct):
    """The predefined header of a function that is no bridge, 64 bytes; *bars* has six words."""

    vendor_id: int
    device_id: int
    command: int
    status: int
    revision_id: int
    prog_if: int
    subclass: int
    base_class: int
    cache_line_size: int
    latency_timer: int
    header_type: int
    bist: int
    bars: list[int]
    cardbus_cis: int
    subsystem_vendor_id: int
    subsystem_id: int
    rom_address: int
    capability_list: int
    reserved: bytes
    interrupt_line: int
    interrupt_pin: int
    min_gnt: int
    max_lat: int

    SUBCON = c.Struct(
        "vendor_id" / c.Int16ul,
        "device_id" / c.Int16ul,
        "command" / c.Int16ul,
        "status" / c.Int16ul,
        "revision_id" / c.Int8ul,
        "prog_if" / c.Int8ul,
        "subclass" / c.Int8ul,
        "base_class" / c.Int8ul,
        "cache_line_size" / c.Int8ul,
        "latency_timer" / c.Int8ul,
        "header_type" / c.Int8ul,
        "bist" / c.Int8ul,
        "bars" / c.Array(6, c.Int32ul),
        "cardbus_cis" / c.Int32ul,
        "subsystem_vendor_id" / c.Int16ul,
        "subsystem_id" / c.Int16ul,
        "rom_address" / c.Int32ul,
        "capability_list" / c.Int8ul,
        "reserved" / c.Bytes(7),
        "interrupt_line" / c.Int8ul,
        "interrupt_pin" / c.Int8ul,
        "min_gnt" / c.Int8ul,
        "max_lat" / c.Int8ul,
    )


class CapabilityHeader(WireStruct):
    """The start of every capability; *next* is an offset in configuration space (0: the last)."""

    id: int
    next: int

    SUBCON = c.Struct("id" / c.Int8ul, "next" / c.Int8ul)


class ExtendedCapabilityHeader(WireStruct):
    """The start of every extended capability (PCI Express, from offset 256 on).

    Bits 0 to 15 are the id, 16 to 19 the version, 20 to 31 the offset of the next one.
    """

    word: int

    SUBCON = c.Struct("word" / c.Int32ul)


class PowerManagementCapability(WireStruct):
    """Power management, 8 bytes; *pmc* 3 means version 1.2 and no power states between D0 and D3.

    No_Soft_Reset (bit 3 of *pmcsr*) stays clear.  For Linux it means that a suspended device keeps
    its state, but a machine that wakes up from S3 has reset its devices.
    """

    id: int = CapId.PM
    next: int = 0
    pmc: int = 0x0003
    pmcsr: int = 0
    bridge: int = 0
    data: int = 0

    SUBCON = c.Struct(
        "id" / c.Int8ul,
        "next" / c.Int8ul,
        "pmc" / c.Int16ul,
        "pmcsr" / c.Int16ul,
        "bridge" / c.Int8ul,
        "data" / c.Int8ul,
    )


class MsiControl(enum.IntFlag):
    """Message Control of MSI; bits 1 to 3 are the binary logarithm of the vectors offered."""

    ENABLE = 1 << 0
    MULTIPLE_ENABLE = 7 << 4
    ADDRESS_64 = 1 << 7


class MsiCapability(WireStruct):
    """MSI with 64-bit addresses and without mask bits, 14 bytes."""

    id: int = CapId.MSI
    next: int = 0
    control: int = MsiControl.ADDRESS_64
    address: int = 0
    data: int = 0

    SUBCON = c.Struct(
        "id" / c.Int8ul,
        "next" / c.Int8ul,
        "control" / c.Int16ul,
        "address" / c.Int64ul,
        "data" / c.Int16ul,
    )


class MsixControl(enum.IntFlag):
    """Message Control of MSI-X; the low 11 bits are the table size minus one."""

    TABLE_SIZE = 0x7FF
    FUNCTION_MASK = 1 << 14
    ENABLE = 1 << 15


class MsixCapability(WireStruct):
    """MSI-X, 12 bytes; the low three bits of *table* and *pba* name the BAR."""

    id: int = CapId.MSIX
    next: int = 0
    control: int = 0
    table: int = 0
    pba: int = 0

    SUBCON = c.Struct(
        "id" / c.Int8ul,
        "next" / c.Int8ul,
        "control" / c.Int16ul,
        "table" / c.Int32ul,
        "pba" / c.Int32ul,
    )


class MsixTableEntry(WireStruct):
    """One vector of the MSI-X table, 16 bytes; bit 0 of *control* masks it (set after reset)."""

    address: int = 0
    data: int = 0
    control: int = 1

    SUBCON = c.Struct("address" / c.Int64ul, "data" / c.Int32ul, "control" / c.Int32ul)


class ExpressCapability(WireStruct):
    """PCI Express, version 2, 60 bytes.

    The defaults are those of a plain Endpoint on a 2.5 GT/s x1 link: payloads of 128 bytes,
    role-based error reporting, function level reset.
    """

    id: int = CapId.EXPRESS
    next: int = 0
    flags: int = 0x0002
    devcap: int = 0x10008000
    devctl: int = 0
    devsta: int = 0
    lnkcap: int = 0x00000011
    lnkctl: int = 0
    lnksta: int = 0x0011
    sltcap: int = 0
    sltctl: int = 0
    sltsta: int = 0
    rtctl: int = 0
    rtcap: int = 0
    rtsta: int = 0
    devcap2: int = 0
    devctl2: int = 0
    devsta2: int = 0
    lnkcap2: int = 0x00000002
    lnkctl2: int = 0x0001
    lnksta2: int = 0
    sltcap2: int = 0
    sltctl2: int = 0
    sltsta2: int = 0

    SUBCON = c.Struct(
        "id" / c.Int8ul,
        "next" / c.Int8ul,
        "flags" / c.Int16ul,
        "devcap" / c.Int32ul,
        "devctl" / c.Int16ul,
        "devsta" / c.Int16ul,
        "lnkcap" / c.Int32ul,
        "lnkctl" / c.Int16ul,
        "lnksta" / c.Int16ul,
        "sltcap" / c.Int32ul,
        "sltctl" / c.Int16ul,
        "sltsta" / c.Int16ul,
        "rtctl" / c.Int16ul,
        "rtcap" / c.Int16ul,
        "rtsta" / c.Int32ul,
        "devcap2" / c.Int32ul,
        "devctl2" / c.Int16ul,
        "devsta2" / c.Int16ul,
        "lnkcap2" / c.Int32ul,
        "lnkctl2" / c.Int16ul,
        "lnksta2" / c.Int16ul,
        "sltcap2" / c.Int32ul,
        "sltctl2" / c.Int16ul,
        "sltsta2" / c.Int16ul,
    )
