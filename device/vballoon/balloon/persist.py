# SPDX-License-Identifier: Apache-2.0
"""The balloon's state as it travels with a migrating guest: bytes in, values out, all checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.memory import PageRanges
from vballoon_spec.walk.formats import WalkRange
from virtio_formats.virtio.balloon import (
    CMD_ID_FIRST,
    STATE_MAGIC,
    STATE_VERSION,
    BalloonState,
)
from virtio_formats.wire import WireError

__all__ = ("SavedBalloon", "pack", "unpack")


@dataclass(frozen=True, slots=True)
class SavedBalloon:
    """What a balloon needs to go on elsewhere;"""

    num_pages: int
    actual: int
    poison_val: int
    next_cmd_id: int
    ballooned: PageRanges


def pack(saved: SavedBalloon) -> bytes:
    """The saved form."""
    ranges = np.empty(len(saved.ballooned), dtype=WalkRange.dtype())
    pages = saved.ballooned
    ranges["pfn"], ranges["num"] = pages.start, pages.end - pages.start
    header = BalloonState(
        magic=STATE_MAGIC,
        version=STATE_VERSION,
        num_pages=saved.num_pages,
        actual=saved.actual,
        poison_val=saved.poison_val,
        next_cmd_id=saved.next_cmd_id,
        nr_ballooned=int(ranges.size),
    )
    return header.build() + ranges.tobytes()


def unpack(state: bytes) -> SavedBalloon:
    """Read and check a saved form; raises :class:`~vballoon.errors.ProtocolError`."""
    try:
        header = BalloonState.parse(state[: BalloonState.SIZE])
    except WireError as error:
        raise ProtocolError("device-state", str(error)) from None
    body = state[BalloonState.SIZE :]
    if header.magic != STATE_MAGIC or header.version != STATE_VERSION:
        raise ProtocolError("device-state", "not the state of a vballoon device, or a newer one's")
    if len(body) != header.nr_ballooned * WalkRange.SIZE:
        raise ProtocolError("device-state", f"{header.nr_ballooned} ranges in {len(body)} bytes")
    ranges = np.frombuffer(body, dtype=WalkRange.dtype())
    start, num = ranges["pfn"].astype(np.uint64), ranges["num"].astype(np.uint64)
    if ((start >> np.uint64(52)) | (num >> np.uint64(52))).any():
        raise ProtocolError("device-state", "a page range beyond 64-bit addresses")
    return SavedBalloon(
        num_pages=header.num_pages,
        actual=header.actual,
        poison_val=header.poison_val,
        next_cmd_id=max(header.next_cmd_id, CMD_ID_FIRST),
        ballooned=PageRanges(start, start + num),
    )
