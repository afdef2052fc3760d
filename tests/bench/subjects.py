# SPDX-License-Identifier: Apache-2.0
"""The balloon with one queue, full again and again: what the benchmarks of the rings drive."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
from tests.bench.load import FullRing, make_load
from tests.bench.measure import clock
from tests.bench.peer import Job, Work
from tests.fakes.memory import Arena

from vballoon.balloon import Balloon
from vballoon.memory import ByteRanges, GuestMemory
from vballoon.skipmap import Provenance
from vballoon.virtio import DeviceQueue
from vballoon.virtqueue import make_virtqueue
from vballoon_spec.walk.formats import WalkBegin, WalkHeader, WalkRange, WalkType
from virtio_formats.virtio import features as f
from virtio_formats.virtio.balloon import BalloonCmdId, BalloonFeature

__all__ = ("ROLES", "CSubject", "Case", "OurSubject", "Payloads", "without_kernel")

PAGE = 4096
BLOCK = 1024
"""Pages of a block: order 10, the largest of Linux' allocator (4 MiB)."""
PFNS = 256
"""Page numbers in an inflate buffer, as many as Linux sends."""
REPORT = 32
"""Blocks in a report, as many as Linux sends at most."""
WALK_BUFFER, WALK_RECORDS, WALK_BLOCK = 32768, 2047, 8
"""Bytes of a walk buffer and ranges in it, as the guest module sends them; pages of a range, so
few that no page is in two of them: nobody's free lists have one twice."""


COMPILED = tuple(
    f"vballoon.{module}.native"
    for module in (
        "memory.pages",
        "memory.ranges",
        "memory.gather",
        "memory.discard",
        "skipmap.bitmap",
        "skipmap.bits",
    )
)
"""Where compiled loops are used outside of the engines; None there means NumPy."""


@dataclass(frozen=True)
class Role:
    """A queue: feature, index, what is in a buffer, where its bits go."""

    name: str
    feature: BalloonFeature
    index: int
    work: int
    provenance: Provenance
    parts: int
    ranges: int
    """Page ranges (or page numbers) in one buffer."""


ROLES = {
    "hint": Role("hint", BalloonFeature.FREE_PAGE_HINT, 2, Work.RANGES, Provenance.HINTED, 1, 1),
    "report": Role(
        "report", BalloonFeature.PAGE_REPORTING, 2, Work.RANGES, Provenance.REPORTED, REPORT, REPORT
    ),
    "inflate": Role(
        "inflate", BalloonFeature.MUST_TELL_HOST, 0, Work.PFNS, Provenance.BALLOONED, 1, PFNS
    ),
    "walk": Role(
        "walk", BalloonFeature.FREE_PAGE_WALK, 2, Work.WALK, Provenance.WALKED, 1, WALK_RECORDS
    ),
}


@dataclass(frozen=True)
class Case:
    """One ring: what it is for, its format and size."""

    role: str
    size: int
    packed: bool = False
    indirect: bool = False
    event_idx: bool = True

    @property
    def features(self) -> int:
        """Ring features."""
        bits = [f.VIRTIO_F_VERSION_1]
        bits += [f.VIRTIO_F_RING_PACKED] if self.packed else []
        bits += [f.VIRTIO_F_INDIRECT_DESC] if self.indirect else []
        # our packed load does not keep a packed event index, so it is not negotiated there
        bits += [f.VIRTIO_F_EVENT_IDX] if self.event_idx and not self.packed else []
        return f.mask(*bits)

    @property
    def name(self) -> str:
        """For people."""
        return (
            f"{self.role}, {'packed' if self.packed else 'split'}, "
            f"{'indirect' if self.indirect else 'direct'}"
        )


class Payloads:
    """What a guest sends, batch after batch, the same for every contender that has the same seed.

    Blocks of *block* pages come in a shuffled order, all of guest memory before any comes again.
    """

    def __init__(self, case: Case, memory: GuestMemory, reserved: int, block: int = BLOCK) -> None:
        self.case, self.role = case, ROLES[case.role]
        self.block = block = WALK_BLOCK if case.role == "walk" else block
        first = -(-reserved // (block * PAGE))
        self._blocks = np.arange(first, memory.end // (block * PAGE), dtype=np.uint64)
        np.random.default_rng(11).shuffle(self._blocks)
        self._at = 0

    def blocks(self, count: int) -> np.ndarray:
        """Page numbers of the next *count* blocks."""
        at = (self._at + np.arange(count)) % self._blocks.size
        self._at = (self._at + count) % self._blocks.size
        return self._blocks[at] * np.uint64(self.block)

    def ranges(self, buffers: int) -> tuple[np.ndarray, np.ndarray]:
        """Address and length of the blocks of *buffers* hints or reports."""
        addr = self.blocks(buffers * self.role.parts) * np.uint64(PAGE)
        return addr, np.full(addr.size, self.block * PAGE, np.uint32)

    def pfns(self, buffers: int) -> np.ndarray:
        """Page numbers for *buffers* inflate buffers: those of whole blocks, ascending in each."""
        total = buffers * PFNS
        span = min(self.block, PFNS)
        starts = self.blocks(-(-total // span))
        return (
            (starts[:, None] + np.arange(span, dtype=np.uint64)).astype("<u4").reshape(-1)[:total]
        )

    def records(self, buffers: int) -> np.ndarray:
        """``WalkRange`` records, one block each."""
        records = np.zeros(buffers * WALK_RECORDS, WalkRange.dtype())
        records["pfn"] = self.blocks(records.size)
        records["num"] = self.block
        return records


class Subject:
    """A ring in guest memory with its load; :meth:`refill` makes it full, a subclass serves it."""

    def __init__(self, case: Case, memory: GuestMemory, arena: Arena, payloads: Payloads) -> None:
        self.case, self.role, self.memory, self.payloads = case, ROLES[case.role], memory, payloads
        self.load: FullRing = make_load(
            memory, case.size, case.features, arena, parts=self.role.parts, indirect=case.indirect
        )
        self.buffers = self.load.buffers
        each = {Work.RANGES: 0, Work.PFNS: 4 * PFNS, Work.WALK: WALK_BUFFER}[self.role.work]
        self._each = each
        if each:
            self._base = arena.take(each * self.buffers, PAGE)
            self._area = memory.window(self._base, each * self.buffers)
        self._round = 0
        self._seq = 0

    @property
    def bytes_touched(self) -> int:
        """Bytes that serving a full ring has to read or write: ring, payload, bitmap."""
        bits = self.role.ranges * (1 if self.role.work == Work.PFNS else self.payloads.block)
        payload = {Work.RANGES: 0, Work.PFNS: 4 * PFNS, Work.WALK: 16 + 16 * WALK_RECORDS}
        return self.buffers * (
            self.load.bytes_per_buffer + payload[self.role.work] + max(1, bits // 8)
        )

    def refill(self) -> None:
        """Fill the ring."""
        if self.role.work == Work.RANGES:
            addr, length = self.payloads.ranges(self.buffers)
            self.load.fill(addr, length, writable=True)
            return
        if self.role.work == Work.PFNS:
            self._area.view("<u4")[:] = self.payloads.pfns(self.buffers)
            size = 4 * PFNS
        else:
            self._write_walk()
            size = 16 + 16 * WALK_RECORDS
        addr = self._base + self._each * np.arange(self.buffers, dtype=np.uint64)
        self.load.fill(addr, np.full(self.buffers, size), writable=False)

    def _write_walk(self) -> None:
        rows = self._area.reshape(self.buffers, WALK_BUFFER)
        head = np.zeros(self.buffers, WalkHeader.dtype())
        head["type"], head["round"], head["num"] = WalkType.RANGES, self._round, WALK_RECORDS
        head["seq"] = self._seq + np.arange(self.buffers)
        self._seq += self.buffers
        rows[:, :16] = head.view(np.uint8).reshape(self.buffers, 16)
        records = self.payloads.records(self.buffers)
        rows[:, 16 : 16 + 16 * WALK_RECORDS] = records.view(np.uint8).reshape(self.buffers, -1)

    def turn(self) -> float:
        """Refill, serve, check; the seconds that serving took."""
        self.refill()
        seconds = self.serve()
        assert self.load.drain() == self.buffers
        return seconds

    def serve(self) -> float:
        """Serve what is available; the seconds it took."""
        raise NotImplementedError

    @property
    def words(self) -> np.ndarray:
        """The bitmap so far."""
        raise NotImplementedError


class CSubject(Subject):
    """The C loops."""

    def __init__(
        self, case: Case, memory: GuestMemory, arena: Arena, payloads: Payloads, *, lean: bool
    ) -> None:
        super().__init__(case, memory, arena, payloads)
        self.job = Job(memory, case.size, self.load.addresses, case.features, self.role.work)
        self._lean = lean

    def serve(self) -> float:
        done, seconds = self.job.serve(lean=self._lean)
        assert (done, self.job.raw.bad) == (self.buffers, 0)
        return seconds

    @property
    def words(self) -> np.ndarray:
        return self.job.bitmap[: self.memory.end >> 18]


class OurSubject(Subject):
    """Our device with one of its engines.  It is also the device's transport."""

    def __init__(
        self, case: Case, memory: GuestMemory, arena: Arena, payloads: Payloads, *, engine: str
    ) -> None:
        super().__init__(case, memory, arena, payloads)
        self._patches = [mock.patch(name, None) for name in COMPILED] if engine == "numpy" else []
        ring = make_virtqueue(
            memory,
            case.size,
            self.load.addresses,
            case.features,
            engine=engine,  # type: ignore[arg-type]
        )
        self.features = case.features | int(self.role.feature)
        self.notified = 0
        self.queues = {
            self.role.index: DeviceQueue(
                self.role.index, ring, notify=self._notify, on_broken=self._broken
            )
        }
        self.queue = self.queues[self.role.index]
        self.balloon = Balloon()
        self.balloon.attach(self)
        self.balloon.start()
        self._begin(arena)

    def config_changed(self) -> None:
        """Do nothing: the driver reads the configuration in any case."""

    def _notify(self) -> None:
        self.notified += 1

    def _broken(self, _queue: DeviceQueue, error: Exception) -> None:
        raise error

    def _begin(self, arena: Arena) -> None:
        """Return the first buffer of a round."""
        if self.case.role == "hint":
            data = BalloonCmdId(cmd_id=self.balloon.start_hinting()).build()
        elif self.case.role == "walk":
            self._round, self._seq = self.balloon.start_walk(), 1
            body = dict.fromkeys(WalkBegin.dtype().names or (), 0) | {"page_shift": 12}
            data = WalkHeader(type=WalkType.BEGIN, round=self._round).build()
            data += WalkBegin(**body).build()
        else:
            return
        at = arena.take(len(data))
        self.memory.write(at, data)
        self.load.fill(np.array([at]), np.array([len(data)]), writable=False)
        self.serve()
        assert self.load.drain() == 1

    def serve(self) -> float:
        balloon, queue = self.balloon, self.queue
        for patch in self._patches:
            patch.start()
        start = clock()
        while balloon.process(queue):
            pass
        seconds = clock() - start
        for patch in self._patches:
            patch.stop()
        return seconds

    @property
    def words(self) -> np.ndarray:
        return self.balloon.skipmap.bitmap(self.role.provenance).words[: self.memory.end >> 18]


class _Void:
    """In the place of the calls that free memory; cheaper than a mock."""

    def __call__(self, _fd: int, ranges: ByteRanges) -> tuple[int, int]:
        return len(ranges), 0


def without_kernel() -> mock._patch[object]:
    """Holes are not punched: the kernel's time for that is the same whoever asks."""
    return mock.patch("vballoon.memory.discard.punch_holes", new_callable=_Void)
