# SPDX-License-Identifier: Apache-2.0
"""The ring formats: sizes, places and values as the standard prints them.

The expected numbers are read from the tables and listings of split-ring.tex and packed-ring.tex
(git revision 15f488c1), not from the declarations.
"""

from __future__ import annotations

import pytest

from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed, split
from virtio_formats.wire import WireStruct


@pytest.mark.parametrize(
    ("struct", "layout"),
    [
        (split.VirtqDesc, {"addr": (0, 8), "len": (8, 4), "flags": (12, 2), "next": (14, 2)}),
        (split.VirtqAvailHeader, {"flags": (0, 2), "idx": (2, 2)}),
        (split.VirtqUsedHeader, {"flags": (0, 2), "idx": (2, 2)}),
        (split.VirtqUsedElem, {"id": (0, 4), "len": (4, 4)}),
        (packed.PvirtqDesc, {"addr": (0, 8), "len": (8, 4), "id": (12, 2), "flags": (14, 2)}),
        (packed.PvirtqEventSuppress, {"desc": (0, 2), "flags": (2, 2)}),
    ],
)
def test_layout(struct: type[WireStruct], layout: dict[str, tuple[int, int]]) -> None:
    fields = struct.dtype().fields
    assert fields is not None
    found = {name: (offset, kind.itemsize) for name, (kind, offset, *_) in fields.items()}
    assert found == layout
    assert struct.SIZE == struct.dtype().itemsize == sum(size for _, size in layout.values())
    for name, (offset, size) in layout.items():
        value = int.from_bytes(bytes(range(1, size + 1)), "little")
        data = struct(**dict.fromkeys(layout, 0) | {name: value}).build()
        assert data[offset : offset + size] == bytes(range(1, size + 1))
        assert data.count(0) == struct.SIZE - size


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_areas_of_a_split_ring(size: int) -> None:
    """The table of parts: 16 * size, 6 + 2 * size, 6 + 8 * size."""
    assert split.desc_size(size) == 16 * size
    assert split.avail_size(size) == 6 + 2 * size
    assert split.used_size(size) == 6 + 8 * size
    assert split.used_event_offset(size) + 2 == split.avail_size(size)
    assert split.avail_event_offset(size) + 2 == split.used_size(size)
    assert split.avail_size(size, event_idx=False) == split.avail_size(size) - 2
    assert split.used_size(size, event_idx=False) == split.used_size(size) - 2


def test_area_of_a_packed_ring() -> None:
    assert packed.ring_size(7) == 112


def test_values() -> None:
    assert (split.DESC_ALIGN, split.AVAIL_ALIGN, split.USED_ALIGN) == (16, 2, 4)
    assert (packed.RING_ALIGN, packed.EVENT_ALIGN) == (16, 4)
    assert split.QUEUE_SIZE_MAX == packed.QUEUE_SIZE_MAX == 2**15
    for ring in (split, packed):
        assert ring.VIRTQ_DESC_F_NEXT == 1
        assert ring.VIRTQ_DESC_F_WRITE == 2
        assert ring.VIRTQ_DESC_F_INDIRECT == 4
    assert packed.VIRTQ_DESC_F_AVAIL == 0x80
    assert packed.VIRTQ_DESC_F_USED == 0x8000
    assert split.VIRTQ_AVAIL_F_NO_INTERRUPT == split.VIRTQ_USED_F_NO_NOTIFY == 1
    assert packed.RING_EVENT_FLAGS_ENABLE == 0
    assert packed.RING_EVENT_FLAGS_DISABLE == 1
    assert packed.RING_EVENT_FLAGS_DESC == 2
    assert (packed.EVENT_OFFSET_MASK, packed.EVENT_WRAP_SHIFT) == (0x7FFF, 15)
    assert packed.EVENT_FLAGS_MASK == 3


def test_feature_bits() -> None:
    assert f.VIRTIO_F_INDIRECT_DESC == 28
    assert f.VIRTIO_F_EVENT_IDX == 29
    assert f.VIRTIO_F_VERSION_1 == 32
    assert f.VIRTIO_F_ACCESS_PLATFORM == 33
    assert f.VIRTIO_F_RING_PACKED == 34
    assert f.VIRTIO_F_IN_ORDER == 35
    assert f.VIRTIO_F_ORDER_PLATFORM == 36
    assert f.VIRTIO_F_SR_IOV == 37
    assert f.VIRTIO_F_NOTIFICATION_DATA == 38
    assert f.VIRTIO_F_NOTIF_CONFIG_DATA == 39
    assert f.VIRTIO_F_RING_RESET == 40
    assert f.mask() == 0
    assert f.mask(0, 34, 34) == (1 << 34) | 1
    assert f.has(1 << 34, 34)
    assert not f.has(1 << 34, 33)
