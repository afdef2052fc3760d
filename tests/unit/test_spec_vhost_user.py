# SPDX-License-Identifier: Apache-2.0
"""vhost-user's wire formats: sizes that the C structs have, round trips, and equal meaning.

The sizes are not copied from the declarations: they are what the C compiler gives the structs
that vhost-user.rst shows (natural alignment, ``VhostUserMsg`` packed).
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtio_formats.vhost_user as vu
from virtio_formats.wire import WireError

U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


def c_layout(*fields):
    """Return a C struct in the layout of the platform's compiler (the oracle)."""
    return type("Layout", (ctypes.Structure,), {"_fields_": list(fields)})


C_STRUCTS = {
    vu.VhostUserHeader: c_layout(("request", U32), ("flags", U32), ("size", U32)),
    vu.VhostUserU64: c_layout(("u64", U64)),
    vu.VhostVringState: c_layout(("index", U32), ("num", U32)),
    vu.VhostVringAddr: c_layout(
        ("index", U32), ("flags", U32), ("descriptor", U64), ("used", U64), ("available", U64),
        ("log", U64),
    ),
    vu.VhostUserMemoryRegion: c_layout(
        ("guest_address", U64), ("size", U64), ("user_address", U64), ("mmap_offset", U64)
    ),
    vu.VhostUserLog: c_layout(("mmap_size", U64), ("mmap_offset", U64)),
    vu.VhostIotlbMsg: c_layout(
        ("iova", U64), ("size", U64), ("uaddr", U64), ("perm", U8), ("type", U8)
    ),
    vu.VhostUserVringArea: c_layout(("u64", U64), ("size", U64), ("offset", U64)),
    vu.VhostUserInflight: c_layout(
        ("mmap_size", U64), ("mmap_offset", U64), ("num_queues", U16), ("queue_size", U16)
    ),
    vu.VhostUserTransferDeviceState: c_layout(("direction", U32), ("phase", U32)),
    vu.VhostUserMMap: c_layout(
        ("shmid", U8), ("padding", U8 * 7), ("fd_offset", U64), ("shm_offset", U64), ("len", U64),
        ("flags", U64),
    ),
    vu.VhostUserShMemConfig: c_layout(
        ("num_regions", U32), ("padding", U32), ("mem_sizes", U64 * 256)
    ),
    vu.DescStateSplit: c_layout(
        ("inflight", U8), ("padding", U8 * 5), ("next", U16), ("counter", U64)
    ),
    vu.QueueRegionSplit: c_layout(
        ("features", U64), ("version", U16), ("desc_num", U16), ("last_batch_head", U16),
        ("used_idx", U16),
    ),
    vu.DescStatePacked: c_layout(
        ("inflight", U8), ("padding", U8), ("next", U16), ("last", U16), ("num", U16),
        ("counter", U64), ("id", U16), ("flags", U16), ("len", U32), ("addr", U64),
    ),
    vu.QueueRegionPacked: c_layout(
        ("features", U64), ("version", U16), ("desc_num", U16), ("free_head", U16),
        ("old_free_head", U16), ("used_idx", U16), ("old_used_idx", U16),
        ("used_wrap_counter", U8), ("old_used_wrap_counter", U8), ("padding", U8 * 7),
    ),
}  # fmt: skip

FIXED = [
    getattr(vu, name)
    for name in vu.__all__
    if hasattr(getattr(vu, name), "SUBCON") and getattr(vu, name).SIZE > 0
]


@pytest.mark.parametrize("cls", C_STRUCTS, ids=lambda cls: cls.__name__)
def test_layout_is_that_of_the_c_struct(cls):
    layout = C_STRUCTS[cls]
    assert ctypes.sizeof(layout) == cls.SIZE
    offsets = {name: cls.dtype().fields[name][1] for name in cls.dtype().names}
    for name, *_ in layout._fields_:
        assert offsets[name] == getattr(layout, name).offset, name


def test_every_fixed_format_has_a_c_struct_to_compare_with():
    without = {vu.VhostUserMemRegMsg, vu.VhostUserShared}  # pure sequences of the others' fields
    assert set(FIXED) - without == set(C_STRUCTS)


@pytest.mark.parametrize("cls", FIXED, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_bytes_survive_a_round_trip_and_numpy_reads_the_same(cls, data):
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    parsed = cls.parse(raw)
    assert parsed.build() == raw
    row = np.frombuffer(raw, cls.dtype())[0]
    for name in cls.dtype().names:
        value = getattr(parsed, name)
        seen = row[name]
        assert (list(value) if np.ndim(seen) else value) == (
            seen.tolist() if np.ndim(seen) else int(seen)
        )


@pytest.mark.parametrize("cls", FIXED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_size_is_an_error(cls, change):
    with pytest.raises(WireError):
        cls.parse(bytes(cls.SIZE + change))


def region(i: int) -> vu.VhostUserMemoryRegion:
    return vu.VhostUserMemoryRegion(
        guest_address=i << 20, size=1 << 20, user_address=0x7F0000000000 + (i << 20), mmap_offset=i
    )


@pytest.mark.parametrize("count", range(9))
def test_memory_table_in_both_forms(count):
    regions = [region(i) for i in range(count)]
    short = vu.VhostUserMemory.of(regions).build()
    assert len(short) == 8 + 32 * count
    assert vu.VhostUserMemory.parse_table(short) == regions
    full = short + b"\xaa" * (264 - len(short))
    assert vu.VhostUserMemory.parse_table(full) == regions


@pytest.mark.parametrize(
    ("count", "size"), [(9, 8 + 9 * 32), (0xFFFFFFFF, 264), (2, 8 + 32), (2, 8 + 3 * 32), (0, 4)]
)
def test_memory_table_with_a_wrong_count_or_size(count, size):
    raw = (count.to_bytes(4, "little") + bytes(300))[:size]
    with pytest.raises(WireError):
        vu.VhostUserMemory.parse_table(raw)


def test_inflight_description_with_and_without_tail_padding():
    """QEMU sends the C struct (24 bytes), other front-ends the fields (20 bytes)."""
    rule = vu.MESSAGES[vu.Request.GET_INFLIGHT_FD]
    message = vu.VhostUserInflight(mmap_size=1, mmap_offset=2, num_queues=3, queue_size=4)
    assert rule.parse(message.build()) == message
    assert rule.parse(message.build()[:20]) == message
    with pytest.raises(WireError):
        rule.parse(message.build()[:19])


def test_every_request_but_the_crypto_ones_has_a_rule():
    crypto = {vu.Request.CREATE_CRYPTO_SESSION, vu.Request.CLOSE_CRYPTO_SESSION}
    assert set(vu.MESSAGES) == set(vu.Request) - crypto


def test_requests_and_features_have_the_published_numbers():
    """Spot checks against the list in the document, not against the table."""
    assert [vu.Request(n).name for n in (1, 15, 21, 31, 36, 43)] == [
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_BACKEND_REQ_FD",
        "GET_INFLIGHT_FD",
        "GET_MAX_MEM_SLOTS",
        "CHECK_DEVICE_STATE",
    ]
    bits = {"MQ": 0, "REPLY_ACK": 3, "CONFIG": 9, "INFLIGHT_SHMFD": 12, "STATUS": 16,
            "DEVICE_STATE": 19, "GET_VRING_BASE_INFLIGHT": 20, "SHMEM_MAP": 22}  # fmt: skip
    assert {name: vu.ProtocolFeature[name].bit_length() - 1 for name in bits} == bits
    assert len(vu.ProtocolFeature) == 23
    assert vu.request_name(12) == "SET_VRING_KICK"
    assert vu.request_name(999) == "request 999"


def test_payload_limit_holds_the_largest_payload():
    sizes = [r.payload.SIZE for r in vu.MESSAGES.values() if r.payload]
    sizes += [r.reply.SIZE for r in vu.MESSAGES.values() if r.reply]
    assert max(sizes) == 8 + 8 * 256 < vu.MAX_PAYLOAD
