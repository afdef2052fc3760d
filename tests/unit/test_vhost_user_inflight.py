# SPDX-License-Identifier: Apache-2.0
"""The in-flight record is correct after a crash between any two stores, and checks its file.

Label: "Inflight I/O tracking" of vhost-user.rst (QEMU 11.1.3).  A crash is simulated by copying the
shared bytes after every store of the record.  From each copy a new record must recover exactly the
buffers that were taken and are not yet visible to the driver as used, oldest first.
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memory import memfd

from vballoon.errors import ProtocolError
from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.inflight_packed import PackedInflight
from vballoon.vhost_user.inflight_split import SplitInflight
from vballoon.virtqueue import RingState
from virtio_formats.vhost_user import (
    DescStatePacked,
    DescStateSplit,
    QueueRegionPacked,
    QueueRegionSplit,
    queue_region_size,
)
from virtio_formats.virtio import packed

SIZE = 8
AVAIL, USED = 1 << 7, 1 << 15


class Spy(np.ndarray):
    """An array that reports every store through it or through its views."""

    told = None

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        if Spy.told is not None:
            Spy.told()


def spied(size):
    return np.zeros(size, np.uint8).view(Spy)


@pytest.fixture(autouse=True)
def _no_spy_left():
    yield
    Spy.told = None


class SplitModel:
    """The record of a split ring, and a model of the correct result."""

    def __init__(self, start):
        self.region = spied(queue_region_size(SIZE, packed=False))
        self.record = SplitInflight(self.region, SIZE)
        self.used = start
        self.record.begin(start)
        self.order = []  # taken and not visible as used, oldest first
        self.batch = []  # being taken at this instant
        Spy.told = self.crash

    def crash(self):
        copy = np.array(self.region)
        told, Spy.told = Spy.told, None
        state, again = SplitInflight(copy, SIZE).recover(self.used)
        Spy.told = told
        found = again.ids.tolist()
        # of a batch that is being taken, any first part may be found
        known = len(found) - len(self.order)
        assert found == self.order + self.batch[: max(0, known)]
        assert 0 <= known <= len(self.batch)
        assert state == RingState(avail=(self.used + len(found)) & 0xFFFF, used=self.used)

    def take(self, ids):
        self.batch = ids
        self.record.on_take(np.array(ids, np.uint16), np.ones(len(ids), np.uint16), None)
        self.order, self.batch = self.order + ids, []
        self.crash()

    def give(self, ids):
        wanted = np.array(ids, np.uint16)
        self.record.before_give(wanted)
        self.used = (self.used + len(ids)) & 0xFFFF
        self.order = [i for i in self.order if i not in ids]
        self.crash()  # the index is published, the record is not updated yet
        self.record.after_give(wanted, RingState(avail=0, used=self.used))
        self.crash()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), start=st.sampled_from([0, 65533]))
def test_split_record_after_a_crash_at_any_store(data, start):
    model = SplitModel(start)
    for _ in range(data.draw(st.integers(1, 12))):
        free = [i for i in range(SIZE) if i not in model.order]
        if free and data.draw(st.booleans()):
            some = data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
            model.take(some)
        elif model.order:
            model.give(data.draw(st.lists(st.sampled_from(model.order), min_size=1, unique=True)))


class PackedModel:
    """The record of a packed ring, and a model of the correct result; buffers take 1 to 3 slots."""

    def __init__(self, start, wrap):
        self.region = spied(queue_region_size(SIZE, packed=True))
        self.record = PackedInflight(self.region, SIZE)
        self.used, self.wrap = start, wrap
        self.record.begin(start, wrap)
        self.flags = {}
        self.order = []  # (id, slots)
        self.batch = []
        Spy.told = self.crash

    def flags_at(self, slot):
        return self.flags.get(slot, AVAIL if self.wrap else USED)

    def crash(self):
        copy = np.array(self.region)
        told, Spy.told = Spy.told, None
        state, again = PackedInflight(copy, SIZE).recover(self.flags_at)
        Spy.told = told
        found = list(zip(again.ids.tolist(), again.slots.tolist(), strict=True))
        assert found in (self.order, self.order + self.batch)
        assert (state.used, state.used_wrap) == (self.used, self.wrap)
        ahead = self.used + sum(slots for _, slots in found)
        assert (state.avail, state.avail_wrap) == (ahead % SIZE, self.wrap ^ (ahead >= SIZE))
        assert again.ring["addr"].tolist() == [
            address(ident, n) for ident, slots in found for n in range(slots)
        ]

    def take(self, chains):
        self.batch = chains
        ring = np.zeros(sum(slots for _, slots in chains), packed.PvirtqDesc.dtype())
        ring["addr"] = [address(i, n) for i, slots in chains for n in range(slots)]
        ring["id"] = [i for i, slots in chains for n in range(slots)]
        ids, slots = zip(*chains, strict=True)
        self.record.on_take(np.array(ids, np.uint16), np.array(slots, np.uint16), ring)
        self.order, self.batch = self.order + chains, []
        self.crash()

    def give(self, ids):
        wanted = np.array(ids, np.uint16)
        self.record.before_give(wanted)
        both = (AVAIL | USED) if self.wrap else 0
        self.flags[self.used] = both  # the first flags are written: the driver sees the batch
        ahead = self.used + sum(slots for i, slots in self.order if i in ids)
        old = self.used
        self.used, self.wrap = ahead % SIZE, self.wrap ^ (ahead >= SIZE)
        self.order = [(i, slots) for i, slots in self.order if i not in ids]
        self.crash()
        state = RingState(avail=0, used=self.used, used_wrap=self.wrap)
        self.record.after_give(wanted, state)
        self.flags.pop(old)
        self.crash()


def address(ident, n):
    return ident * 0x1000 + n


@settings(max_examples=60, deadline=None)
@given(data=st.data(), start=st.sampled_from([0, 5]), wrap=st.booleans())
def test_packed_record_after_a_crash_at_any_store(data, start, wrap):
    model = PackedModel(start, wrap)
    for _ in range(data.draw(st.integers(1, 12))):
        busy = dict(model.order)
        room = SIZE - sum(busy.values())
        chains = []
        for ident in data.draw(st.lists(st.integers(0, 9), max_size=4, unique=True)):
            slots = data.draw(st.integers(1, 3))
            if ident not in busy and slots <= room:
                room -= slots
                chains.append((ident, slots))
        if chains and data.draw(st.booleans()):
            model.take(chains)
        elif model.order:
            ids = [i for i, _ in model.order]
            model.give(data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True)))


def test_recovered_buffers_can_be_given_back_and_the_record_continues():
    model = SplitModel(0)
    model.take([3, 1, 2])
    Spy.told = None
    again = SplitInflight(model.region, SIZE)
    _, resubmit = again.recover(0)
    assert resubmit.ids.tolist() == [3, 1, 2]
    again.before_give(np.array([1], np.uint16))
    again.after_give(np.array([1], np.uint16), RingState(used=1))
    again.on_take(np.array([5], np.uint16), np.ones(1, np.uint16), None)
    assert SplitInflight(model.region, SIZE).recover(1)[1].ids.tolist() == [3, 2, 5]


def test_an_orderly_end_leaves_nothing_to_recover():
    for model in (SplitModel(0), PackedModel(0, True)):
        Spy.told = None
        assert model.record.valid
        model.record.end()
        assert not model.record.valid


def head_of(cls, region):
    return region[: cls.SIZE].view(cls.dtype())


BAD_SPLIT = {
    "version": lambda head, desc: head.__setitem__("version", 2),
    "descriptors": lambda head, desc: head.__setitem__("desc_num", 9),
    "used far away": lambda head, desc: head.__setitem__("used_idx", 100),
    "batch list": lambda head, desc: (
        head.__setitem__("used_idx", 0xFFFF),
        head.__setitem__("last_batch_head", 77),
    ),
}


@pytest.mark.parametrize("name", BAD_SPLIT)
def test_a_split_record_that_cannot_be_ours_is_refused(name):
    model = SplitModel(0)
    Spy.told = None
    region = np.array(model.region)
    desc = region[QueueRegionSplit.SIZE :][: SIZE * DescStateSplit.SIZE]
    BAD_SPLIT[name](head_of(QueueRegionSplit, region), desc.view(DescStateSplit.dtype()))
    with pytest.raises(ProtocolError, match="inflight-region"):
        SplitInflight(region, SIZE).recover(0)


BAD_PACKED = {
    "version": lambda head, desc: head.__setitem__("version", 7),
    "descriptors": lambda head, desc: head.__setitem__("desc_num", 0),
    "used index": lambda head, desc: head.__setitem__("old_used_idx", 8),
    "free list loops": lambda head, desc: desc["next"].__setitem__(7, 4),
    "chain length 0": lambda head, desc: desc["num"].__setitem__(0, 0),
    "chain too long": lambda head, desc: desc["num"].__setitem__(0, 200),
    "chain leaves": lambda head, desc: (
        desc["num"].__setitem__(0, 2),
        desc["next"].__setitem__(0, 99),
    ),
    "chain on the free list": lambda head, desc: desc["num"].__setitem__(0, 3),
    "one id twice": lambda head, desc: desc["id"].__setitem__(1, 4),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_a_packed_record_that_cannot_be_ours_is_refused(name):
    model = PackedModel(0, True)
    model.take([(4, 1), (5, 1)])
    Spy.told = None
    region = np.array(model.region)
    desc = region[QueueRegionPacked.SIZE :][: SIZE * DescStatePacked.SIZE]
    BAD_PACKED[name](head_of(QueueRegionPacked, region), desc.view(DescStatePacked.dtype()))
    with pytest.raises(ProtocolError, match="inflight-region"):
        PackedInflight(region, SIZE).recover(model.flags_at)


@given(st.binary(min_size=0, max_size=400), st.booleans(), st.integers(0, 0xFFFF))
def test_any_bytes_are_a_record_or_an_error(junk, is_packed, number):
    region = np.zeros(queue_region_size(SIZE, packed=is_packed), np.uint8)
    junk = junk[: region.size]
    region[: len(junk)] = np.frombuffer(junk, np.uint8)
    with contextlib.suppress(ProtocolError):  # the only error that is allowed
        if is_packed:
            PackedInflight(region, SIZE).recover(lambda _: number)
        else:
            SplitInflight(region, SIZE).recover(number)


def test_an_area_is_the_file_and_its_offset_counts():
    fd = memfd(8192)
    os.pwrite(fd, b"\x11" * 128, 4096 + 64)
    area = InflightArea(os.dup(fd), 2048, 4096 + 64, 2, 4)
    assert set(area.region(0, packed=False).tolist()) >= {0x11}
    assert area.region(2, packed=False) is None
    area.region(1, packed=False)[:] = 0x22
    stride = queue_region_size(4, packed=False)
    assert os.pread(fd, stride, 4096 + 64 + stride) == b"\x22" * stride
    area.close()
    area.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (8193, 0), (4096, 8192), (1 << 63, 0), (4096, (1 << 64) - 4096)]
)
def test_an_area_that_is_not_in_its_file_is_refused_and_closed(size, offset):
    fd = memfd(8192)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProtocolError, match="inflight-area"):
        InflightArea(fd, size, offset, 1, 16)
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_an_area_too_small_for_its_queues_is_refused():
    area = InflightArea(memfd(4096), 4096, 0, 100, 16)
    with pytest.raises(ProtocolError, match="inflight-area"):
        area.region(0, packed=False)
    area.close()


def test_a_new_area_is_large_enough_for_both_kinds_of_ring():
    area = InflightArea.create(3, 128)
    for is_packed in (False, True):
        assert area.region(2, packed=is_packed).size == queue_region_size(128, packed=is_packed)
    area.close()
