# SPDX-License-Identifier: Apache-2.0
"""Formats of the walk queue: sizes, construct against NumPy, and the text of the chapter."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vballoon_spec.walk import formats
from vballoon_spec.walk.formats import WalkHeader, WalkType, buffer_size
from virtio_formats.virtio.balloon import BalloonConfig
from virtio_formats.wire import WireError, WireStruct

CHAPTER = (Path(formats.__file__).parent / "walk-queue.md").read_text()
STRUCTS: dict[str, type[WireStruct]] = {
    "walk_header": formats.WalkHeader,
    "walk_begin": formats.WalkBegin,
    "walk_range": formats.WalkRange,
    "walk_end": formats.WalkEnd,
    "walk_memmap": formats.WalkMemmap,
    "walk_memmap_run": formats.WalkMemmapRun,
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("walk_header", 16),
        ("walk_begin", 48),
        ("walk_range", 16),
        ("walk_end", 64),
        ("walk_memmap", 96),
        ("walk_memmap_run", 32),
    ],
)
def test_sizes_are_what_the_chapter_promises(name: str, size: int) -> None:
    assert size == STRUCTS[name].SIZE == STRUCTS[name].dtype().itemsize


@pytest.mark.parametrize("cls", STRUCTS.values(), ids=STRUCTS)
def test_fields_are_naturally_aligned(cls: type[WireStruct]) -> None:
    assert cls.SIZE % 8 == 0
    fields = cls.dtype().fields
    assert fields is not None
    for name, (dtype, offset, *_) in fields.items():
        assert offset % dtype.itemsize == 0, name


def test_ranges_can_be_viewed_in_place() -> None:
    header = WalkHeader(type=WalkType.RANGES, round=7, seq=1, num=2)
    ranges = [(1 << 40, 512), (2**64 - 1, 2**64 - 1)]
    records = b"".join(formats.WalkRange(pfn=p, num=n).build() for p, n in ranges)
    buffer = header.build() + records
    view = np.frombuffer(buffer, "<u8", offset=WalkHeader.SIZE).reshape(-1, 2)
    assert [tuple(int(x) for x in row) for row in view] == ranges
    assert buffer_size(WalkHeader.parse(buffer[: WalkHeader.SIZE])) == len(buffer)


@given(data=st.data(), name=st.sampled_from(sorted(STRUCTS)))
def test_construct_and_numpy_read_the_same_values(data: st.DataObject, name: str) -> None:
    cls = STRUCTS[name]
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    parsed = cls.parse(raw)
    (viewed,) = np.frombuffer(raw, cls.dtype())
    for field in dataclasses.fields(parsed):  # type: ignore[arg-type]
        assert getattr(parsed, field.name) == int(viewed[field.name])
    assert parsed.build() == raw


@pytest.mark.parametrize(
    ("kind", "num", "size"),
    [
        (WalkType.BEGIN, 0, 64),
        (WalkType.END, 0, 80),
        (WalkType.RANGES, 1, 32),
        (WalkType.RANGES, 4095, 65536),
        (WalkType.MEMMAP, 0, 112),
        (WalkType.MEMMAP, 3, 208),
    ],
)
def test_buffer_size(kind: WalkType, num: int, size: int) -> None:
    assert buffer_size(WalkHeader(type=kind, round=2, num=num)) == size


@pytest.mark.parametrize(
    ("kind", "num"),
    [
        (0, 0),
        (5, 0),
        (0xFFFF, 1),
        (WalkType.BEGIN, 1),
        (WalkType.END, 2**32 - 1),
        (WalkType.RANGES, 0),
        (WalkType.RANGES, 4096),
        (WalkType.RANGES, 2**32 - 1),
        (WalkType.MEMMAP, 2**32 - 1),
    ],
)
def test_headers_that_no_buffer_may_have(kind: int, num: int) -> None:
    with pytest.raises(WireError):
        buffer_size(WalkHeader(type=kind, round=2, num=num))


@given(raw=st.binary(min_size=16, max_size=16))
def test_any_header_gives_a_bounded_size_or_a_wire_error(raw: bytes) -> None:
    try:
        size = buffer_size(WalkHeader.parse(raw))
    except WireError:
        return
    assert WalkHeader.SIZE < size <= formats.BUFFER_MAX


def _chapter_struct(name: str) -> list[tuple[str, str]]:
    found = re.search(rf"struct {name} \{{(.*?)\n\}};", CHAPTER, re.DOTALL)
    assert found, name
    return re.findall(r"^\t(le\d+) (\w+);", found.group(1), re.MULTILINE)


@pytest.mark.parametrize("name", STRUCTS)
def test_the_chapter_shows_the_declared_fields(name: str) -> None:
    fields = STRUCTS[name].dtype().fields
    assert fields is not None
    declared = [(f"le{dtype.itemsize * 8}", field) for field, (dtype, *_) in fields.items()]
    assert _chapter_struct(name) == declared


def test_the_chapter_places_the_configuration_fields() -> None:
    fields = BalloonConfig.dtype().fields
    assert fields is not None
    for name in ("free_page_walk_cmd_id", "free_page_walk_min_order"):
        assert re.search(rf"le32 {name};\s+/\* {fields[name][1]} \*/", CHAPTER)


@pytest.mark.parametrize("side", ["D", "R"])
def test_requirements_are_numbered_without_a_gap(side: str) -> None:
    numbers = [int(n) for n in re.findall(rf"\* \*\*WALK-{side}(\d+)\*\*", CHAPTER)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_requirements_that_the_declarations_cite_exist() -> None:
    cited = set(re.findall(r"WALK-[DR]\d+", Path(formats.__file__).read_text()))
    assert cited
    assert cited <= set(re.findall(r"\*\*(WALK-[DR]\d+)\*\*", CHAPTER))
