# SPDX-License-Identifier: Apache-2.0
"""The C loops of ``peer.c``, compiled here and now, on queues that our engines could serve too."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from vballoon.memory import GuestMemory
from vballoon.virtqueue import RingAddresses
from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed, split

__all__ = ("COMPILER", "Copy", "Job", "Work", "compiler_version", "library")

SOURCE = Path(__file__).with_name("peer.c")
COMPILER = ("gcc", "-O2", "-Wall", "-shared", "-fPIC")
"""-O2 is what Debian builds QEMU and its libraries with."""

u8, u16, u32, u64, ptr = (
    ctypes.c_uint8,
    ctypes.c_uint16,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_void_p,
)


class Work:
    """What is in the buffers (``enum work``)."""

    RANGES, PFNS, WALK = 0, 1, 2


class _Region(ctypes.Structure):
    _fields_ = (("gpa", u64), ("size", u64), ("va", ptr))


class _Job(ctypes.Structure):
    _fields_ = (
        ("num", u32), ("work", u32), ("packed", u32), ("event_idx", u32),
        ("desc", ptr), ("driver", ptr), ("device", ptr), ("regions", ctypes.POINTER(_Region)),
        ("nregions", u32), ("inuse", u32),
        ("last_avail", u16), ("shadow_avail", u16), ("used", u16), ("signalled", u16),
        ("avail_wrap", u32), ("used_wrap", u32),
        ("bitmap", ptr), ("pages", u64), ("buffers", u64), ("bad", u64), ("notify", u64),
        ("protocol", u64), ("broken", u32),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled loops.  Raise :class:`RuntimeError` without a C compiler."""
    if shutil.which(COMPILER[0]) is None:
        raise RuntimeError("the benchmarks compile a C loop to compare with: install gcc")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"peer-{digest}.so"
        subprocess.run([*COMPILER, "-o", str(target), str(SOURCE)], check=True)
        found = ctypes.CDLL(str(target))
    found.timed_serve.argtypes = [ctypes.POINTER(_Job), ctypes.c_int, ctypes.POINTER(u64)]
    found.timed_ranges.argtypes = [ctypes.POINTER(_Job), ptr, u64]
    found.timed_copy.argtypes = [ptr, ptr, u64, u64]
    for name in ("timed_serve", "timed_ranges", "timed_copy"):
        getattr(found, name).restype = u64
    return found


def compiler_version() -> str:
    """Return the version line of the compiler."""
    done = subprocess.run([COMPILER[0], "--version"], capture_output=True, text=True, check=True)
    return f"{done.stdout.splitlines()[0]}, {COMPILER[1]}"


class Job:
    """A queue that C serves; *bitmap* (uint64[]) gets the bits."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: RingAddresses,
        features: int,
        work: int,
    ) -> None:
        self.memory = memory
        self.bitmap = _shared_words(-(-memory.end >> 18) + 1)
        is_packed = f.has(features, f.VIRTIO_F_RING_PACKED)
        sizes = (
            (packed.ring_size(size), 4, 4)
            if is_packed
            else (split.desc_size(size), split.avail_size(size), split.used_size(size))
        )
        areas = (addresses.desc, addresses.driver, addresses.device)
        self._views = [memory.window(a, n) for a, n in zip(areas, sizes, strict=True)]
        self._regions = (_Region * len(memory.regions))(
            *(_Region(r.guest_phys_addr, r.size, _address(r.view)) for r in memory.regions)
        )
        self.raw = _Job(
            num=size,
            work=work,
            packed=is_packed,
            event_idx=f.has(features, f.VIRTIO_F_EVENT_IDX),
            regions=self._regions,
            nregions=len(memory.regions),
            avail_wrap=1,
            used_wrap=1,
            bitmap=self.bitmap.ctypes.data,
            pages=memory.end >> 12,
        )
        self.raw.desc, self.raw.driver, self.raw.device = map(_address, self._views)

    def serve(self, *, lean: bool) -> tuple[int, float]:
        """Serve what is available; buffers, and the seconds it took."""
        done = u64()
        nanoseconds = library().timed_serve(self.raw, lean, done)
        return done.value, nanoseconds * 1e-9

    def plain_ranges(self, records: np.ndarray) -> float:
        """Set the bits of *records* (``WalkRange``); the seconds it took."""
        at = _address(records.view(np.uint8))
        return int(library().timed_ranges(self.raw, at, len(records))) * 1e-9


class Copy:
    """Copies *size* bytes: the floor under everything that has to touch them."""

    def __init__(self, size: int) -> None:
        self._from = np.ones(size, np.uint8)
        self._to = np.zeros(size, np.uint8)

    def __call__(self, repeat: int = 1) -> float:
        """Seconds for *repeat* copies."""
        to, source = _address(self._to), _address(self._from)
        return int(library().timed_copy(to, source, self._to.size, repeat)) * 1e-9


def _shared_words(count: int) -> np.ndarray:
    """Zeroes in a memory file: pages of the kind that our bitmaps are in, for the comparison."""
    fd = os.memfd_create("peer")
    os.ftruncate(fd, 8 * count)
    mapping = mmap.mmap(fd, 8 * count)
    os.close(fd)
    return np.frombuffer(mapping, np.uint64)


def _address(view: np.ndarray | None) -> int:
    assert view is not None  # benchmarks map their memory
    return int(view.ctypes.data)
