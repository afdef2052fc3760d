# SPDX-License-Identifier: Apache-2.0
"""A snapshot's stream: whole at the other end, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memory import memfd
from tests.unit.test_snapshot_store import PAGE, manifest_of

from vballoon.errors import UsageError
from vballoon.memory import ByteRanges
from vballoon.snapshot.copy import SparseHash, sparse_digest
from vballoon.snapshot.pipe import StreamStore, unpack
from vballoon.snapshot.store import open_snapshot
from vballoon_spec.snapshot import Frame, FrameKind

CONTENT = os.urandom(64 * PAGE)
WANTED = ByteRanges([PAGE, 40 * PAGE], [20 * PAGE, 41 * PAGE])


def written() -> bytes:
    """Return a stream, written to a file instead of a pipe."""
    out, ram = memfd(0), memfd(64 * PAGE)
    os.pwrite(ram, CONTENT, 0)
    store = StreamStore(out)
    fd = store.open_state()
    os.write(fd, b"device state")
    os.close(fd)
    store.expect(20 * PAGE)
    assert store.copy(0, "mem.ram", ram, 64 * PAGE, WANTED, lambda done: None) == 20 * PAGE
    manifest = manifest_of(store)  # type: ignore[arg-type]
    store.finish(replace(manifest, memory=(replace(manifest.memory[0], data=20 * PAGE),)))
    stream = os.pread(out, 1 << 24, 0)
    os.close(out)
    os.close(ram)
    return stream


STREAM = written()


def unpacked(stream: bytes, folder: Path) -> Path:
    fd = memfd(0)
    os.pwrite(fd, stream, 0)
    try:
        unpack(fd, folder)
    finally:
        os.close(fd)
    return folder


def test_comes_out_as_a_snapshot(tmp_path: Path) -> None:
    folder = unpacked(STREAM, tmp_path)
    manifest = open_snapshot(folder)
    assert manifest.memory[0].size == 64 * PAGE
    memory = (folder / "mem.ram").read_bytes()
    assert memory[PAGE : 20 * PAGE] == CONTENT[PAGE : 20 * PAGE]
    assert memory[20 * PAGE : 40 * PAGE] == bytes(20 * PAGE)
    assert (folder / "state").read_bytes() == b"device state"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "mem.ram", "state"]


@pytest.mark.parametrize("end", [0, 4, 8, 20, 32, 5000, len(STREAM) // 2, len(STREAM) - 1])
def test_stream_that_ends_early_is_no_snapshot(end: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        unpacked(STREAM[:end], tmp_path)
    with pytest.raises(UsageError, match="not a whole snapshot"):
        open_snapshot(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_changed_byte_is_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: int
) -> None:
    """Refused, or it was in words for people: memory and state are what they were."""
    damaged = bytearray(STREAM)
    damaged[at] ^= change
    folder = tmp_path_factory.mktemp("s")
    try:
        manifest = open_snapshot(unpacked(bytes(damaged), folder))
    except UsageError:
        return
    memory = (folder / manifest.memory[0].file).read_bytes()
    assert memory[PAGE : 20 * PAGE] == CONTENT[PAGE : 20 * PAGE]
    assert memory[40 * PAGE : 41 * PAGE] == CONTENT[40 * PAGE : 41 * PAGE]
    assert memory.count(0) >= 44 * PAGE
    assert (folder / manifest.state.file).read_bytes() == b"device state"


HOSTILE = [
    Frame(kind=1, file=0, offset=1 << 63, length=4),
    Frame(kind=1, file=1 << 20, length=4),
    Frame(kind=1, length=1 << 40),
    Frame(kind=2, length=1 << 40),
    Frame(kind=3, length=1 << 40),
    Frame(kind=4, length=4),
    Frame(kind=9, length=4),
]


@pytest.mark.parametrize("frame", HOSTILE, ids=repr)
def test_absurd_frames_are_refused(frame: Frame, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        unpacked(STREAM[:8] + frame.build() + b"data", tmp_path)


def test_reader_without_room_says_so_before_anything_has_come(tmp_path: Path) -> None:
    size = Frame(kind=FrameKind.SIZE, offset=1 << 50, length=0).build()
    with pytest.raises(UsageError, match=r"need .* MiB, have"):
        unpacked(STREAM[:8] + size + STREAM[8:], tmp_path)
    assert not list(tmp_path.iterdir())


def test_stream_that_goes_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="after the end"):
        unpacked(STREAM + b"x", tmp_path)
    with pytest.raises(UsageError, match="not a whole snapshot"):
        open_snapshot(tmp_path)


def test_machine_that_came_and_cannot_run_is_kept(tmp_path: Path) -> None:
    """The one that it came from has ended: a mistake in the command must not be its end."""
    words = [sys.executable, "-m", "vballoon", "restore", "-", "--ram", str(tmp_path)]
    done = subprocess.run([*words, "--", "false"], input=STREAM, capture_output=True, check=False)
    assert done.returncode == 1
    (kept,) = tmp_path.iterdir()
    assert f"is kept in {kept}" in done.stderr.decode()
    open_snapshot(kept)
    done = subprocess.run(
        [*words, "--", "false"], input=STREAM[:-1], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == [kept]


def test_reader_that_goes_away_is_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(OSError, match="Broken pipe"):
        StreamStore(write)
    os.close(write)


def test_file_names_are_the_readers_own(tmp_path: Path) -> None:
    text = STREAM[STREAM.rindex(b'{\n  "created_ns"') :].replace(b'"mem.ram"', b'"foo.ram"')
    header = Frame(kind=FrameKind.MANIFEST, length=len(text)).build()
    with pytest.raises(UsageError, match="calls the memory"):
        unpacked(STREAM[:8] + header + text, tmp_path)


@given(st.lists(st.tuples(st.integers(0, 300_000), st.binary(max_size=2000)), max_size=8))
def test_hash_on_the_way_is_that_of_the_file(pieces: list[tuple[int, bytes]]) -> None:
    fd, digest, end = memfd(400_000), SparseHash(400_000), 0
    for at, data in sorted(pieces):
        if at >= end and data:
            os.pwrite(fd, data, at)
            digest.add(at, data)
            end = at + len(data)
    assert digest.hexdigest() == sparse_digest(fd)
    os.close(fd)
