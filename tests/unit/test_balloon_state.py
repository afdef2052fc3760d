# SPDX-License-Identifier: Apache-2.0
"""The state of a balloon as a value: taken back it is equal, and damaged it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.rig import Rig

from vballoon.balloon import Role
from vballoon.balloon.persist import BalloonState, pack, unpack
from vballoon.errors import ProtocolError
from vballoon.memory import PageRanges
from vballoon.skipmap import Instant, Provenance, RoundKind, RoundState, SkipMapState
from vballoon_spec.state import ROLE_CODES, StateHeader, state_checksum
from vballoon_spec.walk.formats import WalkRange

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
PAGES = st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)), max_size=5).map(
    PageRanges.of
)
ROUNDS = st.lists(
    st.builds(
        RoundState,
        st.integers(2, (1 << 32) - 1),
        st.sampled_from(RoundKind),
        st.builds(Instant, U64, U64),
        U64,
        U64,
        U64,
    ),
    max_size=2,
    unique_by=lambda r: r.kind,
).map(lambda rounds: tuple(sorted(rounds, key=lambda r: list(RoundKind).index(r.kind))))
STATES = st.builds(
    BalloonState,
    num_pages=U32,
    actual=U32,
    poison_val=U32,
    hint_next_id=st.integers(2, (1 << 32) - 1),
    walk_next_id=st.integers(2, (1 << 32) - 1),
    stats_interval=U32,
    roles=st.dictionaries(st.integers(0, 5), st.sampled_from(Role)).map(
        lambda roles: tuple(sorted(roles.items()))
    ),
    settled_for=st.none() | U64,
    skipmap=st.builds(SkipMapState, PAGES, PAGES, ROUNDS),
)
SAMPLE = BalloonState(
    num_pages=8192,
    actual=3,
    poison_val=0xAAAAAAAA,
    hint_next_id=3,
    walk_next_id=7,
    stats_interval=5,
    roles=((0, Role.INFLATE), (1, Role.DEFLATE), (2, Role.REPORT)),
    settled_for=0x1_0000_0020,
    skipmap=SkipMapState(
        PageRanges([4096, 5000], [4098, 5001]),
        PageRanges([6144], [6656]),
        (RoundState(2, RoundKind.HINT, Instant(123, 456), 1, 512, 0),),
    ),
)
VECTOR = bytes.fromhex(
    "56424c4c0200000041bed5b10020000003000000aaaaaaaa03000000070000000500000001020500"
    "0000000001000000200000000100000001000000020000000100000002000000000000007b000000"
    "00000000c80100000000000001000000000000000002000000000000000000000000000000100000"
    "00000000020000000000000088130000000000000100000000000000001800000000000000020000"
    "00000000"
)
"""The packed form of :data:`SAMPLE` in version 2."""


def fresh() -> Rig:
    return Rig(present=(0, 1))


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_restored_state_is_equal(state: BalloonState) -> None:
    rig = fresh()
    assert unpack(pack(state)) == state
    rig.balloon.restore(state)
    assert rig.balloon.state() == state
    assert rig.balloon.skipmap.count(Provenance.HINTED) == 0
    assert rig.balloon.skipmap.count(Provenance.WALKED) == 0
    assert all(r.void_reason for r in rig.balloon.skipmap.rounds.values())


def test_packed_form_of_this_version() -> None:
    assert pack(SAMPLE) == VECTOR
    assert unpack(VECTOR) == SAMPLE


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(VECTOR) * 8 - 1))
def test_no_flipped_bit_is_believed(bit: int) -> None:
    damaged = bytearray(VECTOR)
    damaged[bit // 8] ^= 1 << bit % 8
    rig = fresh()
    before = rig.balloon.state()
    with pytest.raises(ProtocolError, match="device-state"):
        rig.balloon.load(bytes(damaged))
    assert rig.balloon.state() == before


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(VECTOR) + 20))
def test_cut_or_padded_state_is_refused(length: int) -> None:
    if length != len(VECTOR):
        with pytest.raises(ProtocolError, match="device-state"):
            unpack(VECTOR.ljust(length, b"\0")[:length])


def resigned(body: bytes = VECTOR[StateHeader.SIZE :], **changes: Any) -> bytes:
    """Return the sample with other fields and a checksum that is right for them."""
    header = StateHeader.parse(VECTOR[: StateHeader.SIZE])
    for name, value in changes.items():
        setattr(header, name, value)
    header.checksum = 0
    header.checksum = state_checksum(header.build(), body)
    return header.build() + body


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": 0},
        {"version": 1},
        {"version": 3},
        {"hint_next_id": 1},
        {"walk_next_id": 0},
        {"roles": b"\1\2\7\0\0\0\0\0"},
        {"roles": b"\1\2\0\0\0\0\0\4"},
        {"nr_rounds": 0xFFFF_FFFF},
        {"nr_ballooned": 3},
        {"nr_reported": 0},
    ],
    ids=str,
)
def test_field_that_cannot_be_is_refused_with_a_right_checksum(
    changes: dict[str, Any],
) -> None:
    assert unpack(resigned()) == SAMPLE
    with pytest.raises(ProtocolError, match="device-state"):
        unpack(resigned(**changes))


@pytest.mark.parametrize("record", [(1 << 52, 1), (1, (1 << 64) - 1), ((1 << 64) - 1, 2)])
def test_page_range_beyond_all_addresses_is_refused(record: tuple[int, int]) -> None:
    body = np.array([record], WalkRange.dtype()).tobytes()
    with pytest.raises(ProtocolError, match="64-bit"):
        unpack(resigned(body, nr_rounds=0, nr_ballooned=1, nr_reported=0))


@pytest.mark.parametrize(
    "change",
    [
        {"num_pages": -1},
        {"actual": 1 << 32},
        {"poison_val": 1 << 32},
        {"hint_next_id": 1},
        {"walk_next_id": 1 << 32},
        {"stats_interval": -5},
        {"roles": ((6, Role.WALK),)},
        {"roles": ((1, Role.DEFLATE), (0, Role.INFLATE))},
        {"roles": ((0, "inflateq?"),)},
        {"settled_for": 1 << 64},
        {"skipmap": SkipMapState(PageRanges([0], [1 << 53]))},
        {"skipmap": replace(SAMPLE.skipmap, rounds=SAMPLE.skipmap.rounds * 2)},
    ],
    ids=str,
)
def test_value_that_cannot_be_changes_nothing(change: dict[str, object]) -> None:
    rig = fresh()
    before = rig.balloon.state()
    with pytest.raises(ProtocolError, match="device-state"):
        rig.balloon.restore(replace(SAMPLE, **change))  # type: ignore[arg-type]
    assert rig.balloon.state() == before


def test_restored_pages_that_hold_data_are_not_left_out() -> None:
    """Between two processes the guest may have started anew."""
    rig = fresh()
    rig.fill(4096)
    rig.balloon.restore(SAMPLE)
    kept = rig.balloon.skipmap.valid_now(Provenance.BALLOONED)
    assert kept.extents() == PageRanges([4097, 5000], [4098, 5001])


@settings(max_examples=60, deadline=None)
@given(STATES, st.lists(st.integers(4096, 6700), min_size=1, max_size=8))
def test_no_state_leaves_out_a_page_that_holds_data(state: BalloonState, used: list[int]) -> None:
    """Whatever field is damaged, a restored bit is that of a hole, which reads as it restores."""
    rig = fresh()
    for pfn in used:
        rig.fill(pfn)
    rig.balloon.restore(state)
    for provenance in Provenance:
        kept = rig.balloon.skipmap.valid_now(provenance).extents()
        assert not len(kept & PageRanges(used, [pfn + 1 for pfn in used])), provenance


def test_ranges_beyond_memory_set_nothing() -> None:
    rig = fresh()
    rig.balloon.restore(replace(SAMPLE, skipmap=SkipMapState(PageRanges([1 << 40], [1 << 41]))))
    assert rig.balloon.skipmap.count(Provenance.BALLOONED) == 0


def test_every_role_has_a_code() -> None:
    assert sorted(ROLE_CODES[1:]) == sorted(Role)
