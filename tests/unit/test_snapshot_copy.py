# SPDX-License-Identifier: Apache-2.0
"""What has to be copied, and copying it: nothing else, and nothing less."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memory import memfd

from vballoon.memory import ByteRanges, PageRanges
from vballoon.snapshot import copy
from vballoon.snapshot.copy import CHUNK, copy_extents, fill, sparse_digest
from vballoon.snapshot.extents import data_extents, to_file

PAGE = 4096
extents = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=12).map(
    lambda pairs: as_extents({at + i for at, size in pairs for i in range(size)})
)


def as_extents(numbers: set[int]) -> PageRanges:
    return PageRanges.of((n, n + 1) for n in numbers)


def numbers(ranges: PageRanges | ByteRanges) -> set[int]:
    return set(ranges.numbers().tolist())


@settings(deadline=None)
@given(extents)
def test_guest_pages_are_found_in_their_file(pages: PageRanges) -> None:
    """Two regions of one file, in the other order there, with a gap between them in the guest."""
    regions = [(0, 20 * PAGE, 15 * PAGE), (25 * PAGE, 15 * PAGE, 0)]
    expected = set()
    for page in numbers(pages):
        if page < 20:
            expected.add(page + 15)
        elif 25 <= page < 40:
            expected.add(page - 25)
    found = to_file(pages, regions)
    assert {n // PAGE for n in numbers(found)} == expected
    assert found.total == len(expected) * PAGE


def test_page_beyond_the_signed_range_is_no_page_of_a_file() -> None:
    high = PageRanges([1 << 40], [(1 << 40) + 1])
    assert not len(to_file(high, [(0, 1 << 30, 0)]))


MOVERS: dict[str, Callable[[], int]] = {
    "same file system": lambda: memfd(0),
    "other file system": lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
}


@pytest.mark.parametrize("target", MOVERS.values(), ids=MOVERS)
@settings(max_examples=30, deadline=None)
@given(extents)
def test_copies_the_extents_and_leaves_the_rest_a_hole(
    target: Callable[[], int], wanted: PageRanges
) -> None:
    source, copied = memfd(64 * PAGE), target()
    try:
        content = os.urandom(64 * PAGE)
        os.pwrite(source, content, 0)
        os.ftruncate(copied, 64 * PAGE)
        told: list[int] = []
        total = copy_extents(source, copied, wanted.bytes(), told.append)
        assert total == sum(told) == wanted.total * PAGE
        result = os.pread(copied, 64 * PAGE, 0)
        for page in range(64):
            here = slice(page * PAGE, (page + 1) * PAGE)
            assert result[here] == (content[here] if page in numbers(wanted) else bytes(PAGE))
        assert data_extents(copied, 64 * PAGE).total == total
    finally:
        os.close(source)
        os.close(copied)


def test_each_way_of_moving_is_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(copy, "_copy_file_range", refuse)
    monkeypatch.setattr(copy, "_sendfile", refuse)
    source, target = memfd(4 * PAGE), memfd(4 * PAGE)
    os.pwrite(source, b"x" * 4 * PAGE, 0)
    assert copy_extents(source, target, ByteRanges([PAGE], [3 * PAGE])) == 2 * PAGE
    assert os.pread(target, 4 * PAGE, 0) == bytes(PAGE) + b"x" * 2 * PAGE + bytes(PAGE)


def test_full_disk_is_an_error_and_no_reason_to_try_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: object) -> int:
        calls.append(1)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(copy, "_copy_file_range", full)
    monkeypatch.setattr(copy, "_sendfile", full)
    with pytest.raises(OSError, match="full"):
        copy_extents(memfd(PAGE), memfd(PAGE), ByteRanges([0], [PAGE]))
    assert len(calls) == 1


def test_source_that_ends_early_is_an_error_not_a_loop() -> None:
    with pytest.raises(OSError, match="ends before"):
        copy_extents(memfd(PAGE), memfd(4 * PAGE), ByteRanges([0], [2 * PAGE]))


def test_digest_does_not_see_holes_but_every_byte(tmp_path: Path) -> None:
    content = bytearray(600_000)
    content[100_000:170_000] = os.urandom(70_000)
    content[599_999] = 1
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dense.write_bytes(content)
    with sparse.open("wb") as file:
        file.truncate(len(content))
        file.seek(100_000)
        file.write(content[100_000:170_000])
        file.seek(599_999)
        file.write(b"\1")

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return sparse_digest(file.fileno())

    first = digest(dense)
    assert digest(sparse) == first
    for at in (0, 99_999, 120_000, 300_000, 599_999):
        changed = bytearray(content)
        changed[at] ^= 1
        dense.write_bytes(changed)
        assert digest(dense) != first
    dense.write_bytes(content[100_000:170_000].rjust(600_000 - 4096, b"\0").ljust(600_000, b"\0"))
    assert digest(dense) != first


def test_extents_of_a_file_that_is_all_hole_or_all_data() -> None:
    fd = memfd(16 * PAGE)
    assert data_extents(fd, 16 * PAGE).tolist() == []
    os.pwrite(fd, b"x", 5 * PAGE)
    assert data_extents(fd, 16 * PAGE).tolist() == [[5 * PAGE, 6 * PAGE]]
    os.pwrite(fd, b"x" * 16 * PAGE, 0)
    assert data_extents(fd, 16 * PAGE).tolist() == [[0, 16 * PAGE]]
    assert data_extents(fd, 4 * PAGE).tolist() == [[0, 4 * PAGE]]


def test_zero_chunks_become_holes(tmp_path: Path) -> None:
    """A snapshot that was copied without its holes needs no more memory than the original."""
    data = bytearray(8 * CHUNK)
    data[CHUNK + 5] = 1
    data[6 * CHUNK : 7 * CHUNK] = os.urandom(CHUNK)
    (tmp_path / "fat").write_bytes(data)
    target = memfd(0)
    with (tmp_path / "fat").open("rb") as source:
        assert fill(source.fileno(), target) == 2 * CHUNK
    assert os.pread(target, len(data) + 1, 0) == data
    assert os.fstat(target).st_blocks * 512 == 2 * CHUNK
    os.close(target)


@given(st.lists(st.tuples(st.integers(0, 5 * CHUNK), st.binary(max_size=200)), max_size=8))
def test_filled_is_what_it_was(pieces: list[tuple[int, bytes]]) -> None:
    source, target = memfd(5 * CHUNK + 4096), memfd(0)
    for at, piece in pieces:
        os.pwrite(source, piece, at)
    os.ftruncate(source, 5 * CHUNK + 4096)
    fill(source, target)
    size = 6 * CHUNK
    assert os.pread(target, size, 0) == os.pread(source, size, 0)
    os.close(source)
    os.close(target)


def test_huge_pages_are_filled_through_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on hugetlbfs has no write(). A memfd takes its place here."""
    source, target = memfd(3 * CHUNK), memfd(0)
    os.pwrite(source, os.urandom(2 * CHUNK), 17)
    real = os.fstatvfs(target)

    class Huge:
        f_bsize = 2 << 20

    monkeypatch.setattr(os, "fstatvfs", lambda fd: Huge if fd == target else real)
    monkeypatch.delattr(os, "pwrite")
    fill(source, target)
    monkeypatch.undo()
    assert os.fstat(target).st_size == 2 << 20
    assert os.pread(target, 3 * CHUNK, 0) == os.pread(source, 3 * CHUNK, 0)
    os.close(source)
    os.close(target)
