# SPDX-License-Identifier: Apache-2.0
"""Packing and checking of a :class:`~vballoon.vhost_user.state.BackendState`.

The format is declared in ``virtio_formats.vhost_user.backend_state``.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import TypeVar

from vballoon.errors import ProtocolError
from vballoon.vhost_user.state import AreaState, BackendState, RegionState, VringState
from vballoon.virtio import pack_record, unpack_record
from virtio_formats.vhost_user.backend_state import (
    BACKEND_MAGIC,
    BACKEND_VERSION,
    BackendFlag,
    BackendStateHead,
    CounterFormat,
    RegionFormat,
    VringFormat,
    VringFormatFlag,
)
from virtio_formats.virtio.ring_state import RingRecordFormat
from virtio_formats.wire import WireError, WireStruct

__all__ = ("pack", "unpack")

_CHECKSUM = slice(8, 12)
_COUNTS_MAX = 1 << 10
"""Maximum number of regions, of rings and of counters in a state; real states have fewer."""

Format = TypeVar("Format", bound=WireStruct)


def pack(state: BackendState) -> bytes:
    """Return the bytes of *state*."""
    inflight, log = state.inflight or AreaState(0, 0, 0), state.log or AreaState(0, 0, 0)
    flags = (
        BackendFlag.OWNED * state.owned
        | BackendFlag.FEATURES_OK * state.features_ok
        | BackendFlag.STANDSTILL * state.standstill
        | BackendFlag.CHANGE_DUE * state.change_due
        | BackendFlag.TRANSFERRED * state.transferred
        | BackendFlag.OWN_AREA * state.own_area
    )
    head = BackendStateHead(
        flags=int(flags),
        num_regions=len(state.regions),
        num_vrings=len(state.vrings),
        num_counters=len(state.counters),
        status=state.status,
        acked=state.acked,
        protocol_features=state.protocol_features,
        config_changes=state.config_changes,
        inflight_size=inflight.size,
        inflight_offset=inflight.offset,
        inflight_queues=inflight.num_queues,
        inflight_queue_size=inflight.queue_size,
        inflight_slot=inflight.slot,
        log_slot=log.slot,
        log_size=log.size,
        log_offset=log.offset,
        log_event_slot=state.log_event,
        channel_slot=state.channel,
    )
    parts = [head.build(), *map(_region, state.regions), *map(_vring, state.vrings)]
    parts += [pack_record(v.record) for v in state.vrings]
    parts += [CounterFormat(request=r, count=n).build() for r, n in state.counters]
    data = bytearray(b"".join(parts))
    data[_CHECKSUM] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(data)


def _region(region: RegionState) -> bytes:
    return RegionFormat(
        guest_address=region.guest_address,
        size=region.size,
        user_address=region.user_address,
        mmap_offset=region.mmap_offset,
        slot=region.slot,
    ).build()


def _vring(vring: VringState) -> bytes:
    flags = (
        VringFormatFlag.STARTED * vring.started
        | VringFormatFlag.ENABLED * vring.enabled
        | VringFormatFlag.ADDRESSED * (vring.addr is not None)
        | VringFormatFlag.BASED * (vring.base is not None)
        | VringFormatFlag.RAN * vring.ran
    )
    addr_flags, descriptor, used, available, log = vring.addr or (0, 0, 0, 0, 0)
    return VringFormat(
        flags=int(flags),
        num=vring.num,
        base=vring.base or 0,
        addr_flags=addr_flags,
        descriptor=descriptor,
        used=used,
        available=available,
        log=log,
        kick_slot=vring.kick,
        call_slot=vring.call,
        err_slot=vring.err,
        recovered=vring.recovered,
    ).build()


def unpack(data: bytes) -> BackendState:
    """Return the state in *data*.

    Raise :class:`~vballoon.errors.ProtocolError` ``state-format`` for anything that :func:`pack`
    of this version does not write.
    """
    try:
        state = _unpack(data)
        if pack(state) != data:
            raise ProtocolError("state-format", "unused fields are not zero")
    except (WireError, ProtocolError) as error:
        raise ProtocolError("state-format", str(error)) from None
    return state


def _unpack(data: bytes) -> BackendState:
    head = BackendStateHead.parse(data[: BackendStateHead.SIZE])
    _require(head.magic == BACKEND_MAGIC, "not the state of a vhost-user back-end")
    _require(head.version == BACKEND_VERSION, f"version {head.version}, not {BACKEND_VERSION}")
    blank = bytearray(data)
    blank[_CHECKSUM] = bytes(4)
    _require(zlib.crc32(blank) == head.checksum, "the checksum does not match")
    counts = (head.num_regions, head.num_vrings, head.num_counters)
    _require(max(counts) <= _COUNTS_MAX, f"{max(counts)} parts, at most {_COUNTS_MAX} are possible")
    at = BackendStateHead.SIZE
    regions, at = _cut(RegionFormat, data, at, head.num_regions)
    vrings, at = _cut(VringFormat, data, at, head.num_vrings)
    records, at = data[at:], at + head.num_vrings * RingRecordFormat.SIZE
    counters, at = _cut(CounterFormat, data, at, head.num_counters)
    _require(at == len(data), f"{len(data)} bytes, expected {at}")
    size = RingRecordFormat.SIZE
    pairs = [(v, records[i * size : (i + 1) * size]) for i, v in enumerate(vrings)]
    return replace(
        _head(head),
        regions=tuple(
            RegionState(r.guest_address, r.size, r.user_address, r.mmap_offset, r.slot)
            for r in regions
        ),
        vrings=tuple(_parse_vring(vring, record) for vring, record in pairs),
        counters=tuple((counter.request, counter.count) for counter in counters),
    )


def _head(head: BackendStateHead) -> BackendState:
    flags = BackendFlag(head.flags)
    inflight = AreaState(
        head.inflight_slot,
        head.inflight_size,
        head.inflight_offset,
        head.inflight_queues,
        head.inflight_queue_size,
    )
    return BackendState(
        acked=head.acked,
        protocol_features=head.protocol_features,
        status=head.status,
        owned=bool(flags & BackendFlag.OWNED),
        features_ok=bool(flags & BackendFlag.FEATURES_OK),
        standstill=bool(flags & BackendFlag.STANDSTILL),
        change_due=bool(flags & BackendFlag.CHANGE_DUE),
        transferred=bool(flags & BackendFlag.TRANSFERRED),
        own_area=bool(flags & BackendFlag.OWN_AREA),
        config_changes=head.config_changes,
        inflight=inflight if inflight.slot else None,
        log=AreaState(head.log_slot, head.log_size, head.log_offset) if head.log_slot else None,
        log_event=head.log_event_slot,
        channel=head.channel_slot,
    )


def _parse_vring(saved: VringFormat, record: bytes) -> VringState:
    flags = VringFormatFlag(saved.flags)
    addr = (saved.addr_flags, saved.descriptor, saved.used, saved.available, saved.log)
    return VringState(
        num=saved.num,
        addr=addr if flags & VringFormatFlag.ADDRESSED else None,
        base=saved.base if flags & VringFormatFlag.BASED else None,
        started=bool(flags & VringFormatFlag.STARTED),
        enabled=bool(flags & VringFormatFlag.ENABLED),
        kick=saved.kick_slot,
        call=saved.call_slot,
        err=saved.err_slot,
        recovered=saved.recovered,
        ran=bool(flags & VringFormatFlag.RAN),
        record=unpack_record(record),
    )


def _cut(kind: type[Format], data: bytes, at: int, count: int) -> tuple[list[Format], int]:
    size = kind.SIZE
    end = at + count * size
    return [kind.parse(data[i : i + size]) for i in range(at, end, size)], end


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ProtocolError("state-format", otherwise)
