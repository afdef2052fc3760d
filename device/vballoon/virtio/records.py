# SPDX-License-Identifier: Apache-2.0
"""Packing and checking of :class:`~vballoon.virtio.ringset.RingRecord`.

The format is declared in ``virtio_formats.virtio.ring_state``.
"""

from __future__ import annotations

from vballoon.errors import ProtocolError
from vballoon.virtio.ringset import RingFault, RingRecord
from vballoon.virtqueue import RingState
from virtio_formats.virtio.ring_state import DETAIL_SIZE, RULE_SIZE, RingFlag, RingRecordFormat
from virtio_formats.wire import WireError

__all__ = ("check_record", "pack_record", "unpack_record")

_ALL_FLAGS = RingFlag.POSITION | RingFlag.BROKEN | RingFlag.AVAIL_WRAP | RingFlag.USED_WRAP


def pack_record(record: RingRecord) -> bytes:
    """Return the bytes of *record*."""
    at, fault = record.position or RingState(), record.broken or RingFault("")
    flags = (
        RingFlag.POSITION * (record.position is not None)
        | RingFlag.BROKEN * (record.broken is not None)
        | RingFlag.AVAIL_WRAP * at.avail_wrap
        | RingFlag.USED_WRAP * at.used_wrap
    )
    return RingRecordFormat(
        flags=int(flags),
        avail=at.avail,
        used=at.used,
        outstanding=record.outstanding,
        taken=record.taken,
        given=record.given,
        notified=record.notified,
        kicked=record.kicked,
        rule=fault.rule.encode("ascii").ljust(RULE_SIZE, b"\0"),
        detail=fault.detail.encode("ascii").ljust(DETAIL_SIZE, b"\0"),
    ).build()


def unpack_record(data: bytes) -> RingRecord:
    """Return the record in *data*.

    Raise :class:`~vballoon.errors.ProtocolError` ``ring-record`` for anything that
    :func:`pack_record` does not write.
    """
    try:
        saved = RingRecordFormat.parse(data)
        rule, detail = _text(saved.rule), _text(saved.detail)
    except (WireError, UnicodeDecodeError) as error:
        raise ProtocolError("ring-record", str(error)) from None
    flags = RingFlag(saved.flags)
    position = RingState(
        saved.avail,
        saved.used,
        bool(flags & RingFlag.AVAIL_WRAP),
        bool(flags & RingFlag.USED_WRAP),
    )
    record = RingRecord(
        position=position if flags & RingFlag.POSITION else None,
        outstanding=saved.outstanding,
        broken=RingFault(rule, detail) if flags & RingFlag.BROKEN else None,
        taken=saved.taken,
        given=saved.given,
        notified=saved.notified,
        kicked=saved.kicked,
    )
    if flags & ~_ALL_FLAGS or pack_record(record) != data:
        raise ProtocolError("ring-record", "unused fields are not zero")
    return record


def check_record(record: RingRecord, *, size: int, packed: bool) -> None:
    """Check that *record* can be one of a ring of *size* descriptors.

    Raise :class:`~vballoon.errors.ProtocolError` ``ring-record``.
    """
    at = record.position
    limit = size if packed else 1 << 16
    if at is not None and not (0 <= at.avail < limit and 0 <= at.used < limit):
        raise ProtocolError("ring-record", f"{at} in a ring of {size}")
    if record.outstanding > size:
        raise ProtocolError("ring-record", f"{record.outstanding} buffers in a ring of {size}")


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("ascii")
