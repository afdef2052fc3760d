# SPDX-License-Identifier: Apache-2.0
"""Another process through /proc, and the memory whose writes can be tracked."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import pytest
from tests.fakes.memory import memfd

from vballoon.errors import UsageError
from vballoon.snapshot import tracker
from vballoon.snapshot.process import Process, identity
from vballoon.snapshot.tracker import backing_objection

PAGE = 4096
ME = Process(os.getpid())


def test_mapping_is_found_by_address() -> None:
    fd = memfd(4 * PAGE)
    with mmap.mmap(fd, 2 * PAGE, offset=PAGE) as mapping:
        place = ctypes.c_char.from_buffer(mapping)
        address = ctypes.addressof(place)
        found = ME.mapping_at(address + PAGE)
        assert found is not None
        assert (found.start, found.offset) == (address, PAGE)
        assert (found.inode, found.shared) == (os.fstat(fd).st_ino, True)
        assert ME.page_size_at(address) == PAGE
        del place
    assert ME.mapping_at(0) is None
    assert ME.page_size_at(0) == 0
    os.close(fd)


def test_open_file_has_a_description_of_its_own() -> None:
    fd = memfd(PAGE)
    again = ME.open_file(identity(fd))
    assert again is not None
    assert identity(again) == identity(fd)
    os.lseek(again, 7, os.SEEK_SET)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    wanted = identity(fd)
    os.close(again)
    os.close(fd)
    assert ME.open_file(wanted) is None


def test_byte_is_rewritten_in_place() -> None:
    with mmap.mmap(-1, PAGE) as mapping:
        mapping[5] = 77
        place = ctypes.c_char.from_buffer(mapping)
        ME.rewrite_byte(ctypes.addressof(place) + 5)
        assert mapping[5] == 77
        del place


def test_process_without_access_is_an_error() -> None:
    gone = Process(1 << 22)
    assert gone.name == ""
    for call in (
        lambda: gone.mapping_at(0),
        lambda: gone.page_size_at(0),
        lambda: gone.open_file((1, 1)),
        lambda: gone.rewrite_byte(0),
    ):
        with pytest.raises(UsageError, match="--qemu-pid"):
            call()


def test_name_is_of_one_process_only() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        first = Process(process.pid).name
        assert first.startswith(f"{process.pid}:")
        assert Process(process.pid).name == first
        process.kill()
    assert Process(process.pid).name == ""
    assert ME.name != first


def test_memory_that_is_known_to_work_is_accepted(tmp_path: Path) -> None:
    fd = memfd(PAGE)
    assert backing_objection(fd) == ""
    os.close(fd)
    shm = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    assert backing_objection(shm) == ""
    os.close(shm)


def test_all_other_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = memfd(PAGE)
    number = f"{os.major(os.fstat(fd).st_dev)}:{os.minor(os.fstat(fd).st_dev)}"
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(tracker, "MOUNTS", mounts)
    for line, words in (
        (f"1 2 {number} / /x rw shared:1 - ext4 /dev/vda rw", "a file on ext4"),
        (f"1 2 {number} / /x rw - tmpfs tmpfs rw,size=1k,huge=always", "huge=always"),
        (f"1 2 {number} / /x rw - tmpfs tmpfs rw,huge=within_size,mode=755", "huge=within_size"),
        (f"1 2 {number} / /x rw - hugetlbfs none rw", "a file on hugetlbfs"),
    ):
        mounts.write_text(line + "\n")
        assert words in backing_objection(fd)
    mounts.write_text(f"1 2 {number} / /x rw - tmpfs tmpfs rw,huge=never\n")
    assert backing_objection(fd) == ""
    os.close(fd)


def test_huge_pages_are_refused() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no hugetlb memfd: {error}")
    assert "2048 KiB" in backing_objection(fd)
    os.close(fd)
