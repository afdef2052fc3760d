# SPDX-License-Identifier: Apache-2.0
"""The state of a balloon that outlives a process or moves with a guest: values, checked and packed.

The packed form is ``vballoon_spec.state``.  It comes from a front-end, from another host or from a
process that died, so it is read like any other untrusted input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vballoon.balloon.roles import NUM_QUEUES, Role
from vballoon.errors import ProtocolError
from vballoon.memory import PAGE_SHIFT, PageRanges
from vballoon.skipmap import Instant, RoundKind, RoundState, SkipMapState
from vballoon_spec.state import (
    ROLE_CODES,
    STATE_MAGIC,
    STATE_VERSION,
    StateHeader,
    StateRound,
    state_checksum,
)
from vballoon_spec.walk.formats import WalkRange
from virtio_formats.virtio.balloon import CMD_ID_FIRST
from virtio_formats.wire import WireError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("BalloonState", "check", "pack", "unpack")

_KINDS = (RoundKind.HINT, RoundKind.WALK)
_PAGES_END = 1 << (64 - PAGE_SHIFT)
_LIMITS = {
    "num_pages": (0, 1 << 32),
    "actual": (0, 1 << 32),
    "poison_val": (0, 1 << 32),
    "hint_next_id": (CMD_ID_FIRST, 1 << 32),
    "walk_next_id": (CMD_ID_FIRST, 1 << 32),
    "stats_interval": (0, 1 << 32),
}
"""First and end value of each number."""


@dataclass(frozen=True, slots=True)
class BalloonState:
    """What a balloon needs to continue elsewhere.

    ``num_pages`` is the operator's target and ``actual`` what the driver has given, in pages;
    ``roles`` are pairs of queue index and role, ascending; ``settled_for`` is the negotiated
    feature word for which all roles are known (None: not all are).  Rounds are void when restored;
    their ids are not used again.
    """

    num_pages: int
    actual: int
    poison_val: int
    hint_next_id: int
    walk_next_id: int
    stats_interval: int
    roles: tuple[tuple[int, Role], ...]
    settled_for: int | None
    skipmap: SkipMapState


def check(state: BalloonState) -> None:
    """Raise :class:`~vballoon.errors.ProtocolError` for values that no balloon can have."""
    for name, (low, end) in _LIMITS.items():
        if not low <= getattr(state, name) < end:
            raise _refused(f"{name} is {getattr(state, name)}")
    if state.settled_for is not None and not 0 <= state.settled_for < 1 << 64:
        raise _refused(f"features {state.settled_for:#x}")
    indices = [index for index, _ in state.roles]
    if indices != sorted(set(indices)) or not set(indices) <= set(range(NUM_QUEUES)):
        raise _refused(f"roles of queues {indices}")
    if any(not isinstance(role, Role) for _, role in state.roles):
        raise _refused("a role that no queue has")
    for pages in (state.skipmap.ballooned, state.skipmap.reported):
        if len(pages) and int(pages.end[-1]) > _PAGES_END:
            raise _refused("a page range beyond 64-bit addresses")
    rounds = state.skipmap.rounds
    if len({r.kind for r in rounds}) != len(rounds):
        raise _refused("two rounds of one kind")
    for each in rounds:
        times = (each.published.monotonic_ns, each.published.wall_ns)
        numbers = (*times, each.records, each.pages, each.bad_records)
        if not CMD_ID_FIRST <= each.id < 1 << 32 or not all(0 <= n < 1 << 64 for n in numbers):
            raise _refused(f"round {each.id}")


def pack(state: BalloonState) -> bytes:
    """Return the packed form of *state*.  Raise ProtocolError for values that do not fit."""
    check(state)
    skipmap, codes = state.skipmap, bytearray(StateHeader.dtype()["roles"].itemsize)
    for index, role in state.roles:
        codes[index] = ROLE_CODES.index(role.value)
    header = StateHeader(
        magic=STATE_MAGIC,
        version=STATE_VERSION,
        checksum=0,
        num_pages=state.num_pages,
        actual=state.actual,
        poison_val=state.poison_val,
        hint_next_id=state.hint_next_id,
        walk_next_id=state.walk_next_id,
        stats_interval=state.stats_interval,
        roles=bytes(codes),
        settled=int(state.settled_for is not None),
        features=state.settled_for or 0,
        nr_rounds=len(skipmap.rounds),
        nr_ballooned=len(skipmap.ballooned),
        nr_reported=len(skipmap.reported),
    )
    body = b"".join(_pack_round(each) for each in skipmap.rounds)
    body += _records(skipmap.ballooned) + _records(skipmap.reported)
    header.checksum = state_checksum(header.build(), body)
    return header.build() + body


def unpack(data: bytes) -> BalloonState:
    """Return the state in *data*.  Raise ProtocolError ``device-state`` unless it is valid."""
    try:
        header = StateHeader.parse(data[: StateHeader.SIZE])
    except WireError as error:
        raise _refused(str(error)) from None
    if header.magic != STATE_MAGIC or header.version != STATE_VERSION:
        raise _refused(f"not the state of a vballoon device in version {STATE_VERSION}")
    body, found = data[StateHeader.SIZE :], header.checksum
    sizes = (
        header.nr_rounds * StateRound.SIZE,
        header.nr_ballooned * WalkRange.SIZE,
        header.nr_reported * WalkRange.SIZE,
    )
    if len(body) != sum(sizes):
        raise _refused(f"{len(body)} bytes follow the header, which names {sum(sizes)}")
    header.checksum = 0
    if state_checksum(header.build(), body) != found:
        raise _refused("the checksum is wrong")
    ranges = sizes[0] + sizes[1]
    state = BalloonState(
        **{name: getattr(header, name) for name in _LIMITS},
        roles=_roles(header.roles),
        settled_for=header.features if header.settled else None,
        skipmap=SkipMapState(
            ballooned=_page_ranges(body[sizes[0] : ranges]),
            reported=_page_ranges(body[ranges:]),
            rounds=tuple(_rounds(body[: sizes[0]])),
        ),
    )
    check(state)
    return state


def _roles(codes: bytes) -> tuple[tuple[int, Role], ...]:
    if max(codes) >= len(ROLE_CODES):
        raise _refused(f"roles {codes.hex()}")
    return tuple((index, Role(ROLE_CODES[code])) for index, code in enumerate(codes) if code)


def _pack_round(each: RoundState) -> bytes:
    return StateRound(
        id=each.id,
        kind=_KINDS.index(each.kind),
        published_monotonic=each.published.monotonic_ns,
        published_wall=each.published.wall_ns,
        records=each.records,
        pages=each.pages,
        bad_records=each.bad_records,
    ).build()


def _rounds(data: bytes) -> list[RoundState]:
    found = []
    for at in range(0, len(data), StateRound.SIZE):
        each = StateRound.parse(data[at : at + StateRound.SIZE])
        if each.kind >= len(_KINDS):
            raise _refused(f"a round of kind {each.kind}")
        published = Instant(each.published_monotonic, each.published_wall)
        found.append(
            RoundState(
                each.id, _KINDS[each.kind], published, each.records, each.pages, each.bad_records
            )
        )
    return found


def _records(pages: PageRanges) -> bytes:
    records = np.empty(len(pages), dtype=WalkRange.dtype())
    records["pfn"], records["num"] = pages.start, pages.end - pages.start
    return records.tobytes()


def _page_ranges(data: bytes) -> PageRanges:
    records = np.frombuffer(data, dtype=WalkRange.dtype())
    start: NDArray[np.uint64] = records["pfn"].astype(np.uint64)
    count: NDArray[np.uint64] = records["num"].astype(np.uint64)
    if ((start | count) >= np.uint64(_PAGES_END)).any():
        raise _refused("a page range beyond 64-bit addresses")
    return PageRanges(start, start + count)


def _refused(why: str) -> ProtocolError:
    return ProtocolError("device-state", why)
