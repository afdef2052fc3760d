# SPDX-License-Identifier: Apache-2.0
"""The state of a vhost-user back-end that a restarted process needs to continue a connection.

Ours, not a standard's; little-endian.  Behind :class:`BackendStateHead` come, in this order,
*num_regions* times :class:`RegionFormat`, *num_vrings* times :class:`VringFormat`, *num_vrings*
times :class:`~virtio_formats.virtio.ring_state.RingRecordFormat`, and *num_counters* times
:class:`CounterFormat`.

Descriptors are named by *slots*: numbers from 1 that whoever keeps the state maps to descriptors;
0 is no descriptor.
"""

from __future__ import annotations

import enum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = (
    "BACKEND_MAGIC",
    "BACKEND_VERSION",
    "BackendFlag",
    "BackendStateHead",
    "CounterFormat",
    "RegionFormat",
    "VringFormat",
    "VringFormatFlag",
)

BACKEND_MAGIC = 0x55564256
"""``VBVU``, little-endian."""
BACKEND_VERSION = 1
"""Raised whenever the layout changes."""


class BackendFlag(enum.IntFlag):
    """What is set in the ``flags`` of the head."""

    OWNED = 1
    """SET_OWNER was received."""
    FEATURES_OK = 2
    """The last SET_FEATURES was accepted."""
    STANDSTILL = 4
    """No ring has run since the device was reset or all rings were stopped."""
    CHANGE_DUE = 8
    """A configuration change has not been announced yet."""
    TRANSFERRED = 16
    """The last transfer of device state has succeeded."""
    OWN_AREA = 32
    """The in-flight area is the back-end's own, not the front-end's."""


class BackendStateHead(WireStruct):
    """The head; ``checksum`` is the CRC-32 of the whole state with this field as zero."""

    magic: int = BACKEND_MAGIC
    version: int = BACKEND_VERSION
    checksum: int = 0
    flags: int
    num_regions: int
    num_vrings: int
    num_counters: int
    status: int
    acked: int
    protocol_features: int
    config_changes: int
    inflight_size: int
    inflight_offset: int
    inflight_queues: int
    inflight_queue_size: int
    inflight_slot: int
    log_slot: int
    log_size: int
    log_offset: int
    log_event_slot: int
    channel_slot: int

    SUBCON = c.Struct(
        "magic" / c.Int32ul,
        "version" / c.Int32ul,
        "checksum" / c.Int32ul,
        "flags" / c.Int32ul,
        "num_regions" / c.Int32ul,
        "num_vrings" / c.Int32ul,
        "num_counters" / c.Int32ul,
        "status" / c.Int32ul,
        "acked" / c.Int64ul,
        "protocol_features" / c.Int64ul,
        "config_changes" / c.Int64ul,
        "inflight_size" / c.Int64ul,
        "inflight_offset" / c.Int64ul,
        "inflight_queues" / c.Int32ul,
        "inflight_queue_size" / c.Int32ul,
        "inflight_slot" / c.Int32ul,
        "log_slot" / c.Int32ul,
        "log_size" / c.Int64ul,
        "log_offset" / c.Int64ul,
        "log_event_slot" / c.Int32ul,
        "channel_slot" / c.Int32ul,
    )


class RegionFormat(WireStruct):
    """One memory region, as the front-end described it."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int
    slot: int
    reserved: int = 0

    SUBCON = c.Struct(
        "guest_address" / c.Int64ul,
        "size" / c.Int64ul,
        "user_address" / c.Int64ul,
        "mmap_offset" / c.Int64ul,
        "slot" / c.Int32ul,
        "reserved" / c.Int32ul,
    )


class VringFormatFlag(enum.IntFlag):
    """What is set in the ``flags`` of a vring."""

    STARTED = 1
    ENABLED = 2
    ADDRESSED = 4
    """SET_VRING_ADDR was received; the addresses are valid."""
    BASED = 8
    """The base is valid."""
    RAN = 16
    """The device used the ring: its position is in guest memory, not in the base."""


class VringFormat(WireStruct):
    """What the front-end has said about one ring."""

    flags: int
    num: int
    base: int
    addr_flags: int
    descriptor: int
    used: int
    available: int
    log: int
    kick_slot: int
    call_slot: int
    err_slot: int
    recovered: int

    SUBCON = c.Struct(
        "flags" / c.Int32ul,
        "num" / c.Int32ul,
        "base" / c.Int32ul,
        "addr_flags" / c.Int32ul,
        "descriptor" / c.Int64ul,
        "used" / c.Int64ul,
        "available" / c.Int64ul,
        "log" / c.Int64ul,
        "kick_slot" / c.Int32ul,
        "call_slot" / c.Int32ul,
        "err_slot" / c.Int32ul,
        "recovered" / c.Int32ul,
    )


class CounterFormat(WireStruct):
    """How many messages of one request were received; request 0 counts refused messages."""

    request: int
    reserved: int = 0
    count: int

    SUBCON = c.Struct("request" / c.Int32ul, "reserved" / c.Int32ul, "count" / c.Int64ul)
