# SPDX-License-Identifier: Apache-2.0
"""Rings: what a buffer costs, from the ring to the bitmap and back, beside C doing the same."""

from __future__ import annotations

import numpy as np
from tests.bench.measure import Samples, interleaved, ratio
from tests.bench.options import Options
from tests.bench.peer import Copy, compiler_version
from tests.bench.record import Part, Table
from tests.bench.subjects import Case, CSubject, OurSubject, Payloads, Subject, without_kernel
from tests.fakes.memory import Arena, make_memory

from vballoon.memory import GuestMemory

__all__ = ("run",)

GIB = 1 << 30
ROLES = ("hint", "report", "inflate", "walk")
SIZES = (128, 256, 1024, 4096, 32768)
ALL_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SCALAR_MAX = 4096
"""Above this the scalar engine's turns would take most of the run and say nothing new."""
GUEST, SPACE = 128 * GIB, 8 * GIB
"""A guest in which a ring of 32768 free blocks exists, and the part of it that holds rings and
buffers; a sparse file, so the host need not have that much memory."""
WARM_GUEST, WARM_SPACE = 4 * GIB, GIB // 4
BUFFERS_A_CASE = {"quick": 20_000, "short": 60_000, "full": 400_000}
"""Buffers that decide how many turns a case gets."""


NOTES = [
    (
        "A turn: the driver fills the ring, the device serves it (timed: take, check, record in "
        "the bitmap, give back, decide about notifications), the driver checks what came back."
    ),
    (
        "*batch* is the engine in use, with its inner loops compiled; *numpy* the same without "
        "them; *scalar* the one that walks a descriptor at a time. The C loops are in "
        "`tests/bench/peer.c`: *library* does what a vhost-user library in C does for each buffer, "
        "*lean* the least that is still safe. All bitmaps are in memory files, and are compared "
        "at the end of each case. *copy* is a `memcpy` of as many bytes as have to be read and "
        "written (descriptors, ring entries, payload, bitmap): the floor."
    ),
    (
        "Hints and reports are of free blocks of 4 MiB in shuffled order; a report has 32 of them, "
        "an inflate buffer 256 page numbers, a walk buffer 2047 ranges of 8 pages. Holes are not "
        "punched here, on neither side: that is the kernel's time."
    ),
    (
        "The guest has 128 GiB (a bitmap of 4 MiB, colder than the caches) unless said otherwise. "
        "The bitmap's pages are there: the page fault for the first bit in each 128 MiB of guest "
        "memory is the kernel's time, the same for all, and would count more the smaller a ring is."
    ),
]


def run(options: Options) -> Part:
    """Every queue, format and size."""
    part = Part("rings", "Rings: nanoseconds a buffer")
    part.notes += NOTES
    part.notes.append("C compiler: " + compiler_version() + ".")
    sizes = ALL_SIZES if options.full else SIZES
    with without_kernel():
        for role in ROLES:
            for packed in (False, True):
                for indirect in (False, True):
                    _family(part, options, role, packed, indirect, sizes)
        _warm(part, options)
        _scalar(part, options)
    _judge(part)
    return part


def _family(
    part: Part, options: Options, role: str, packed: bool, indirect: bool, sizes: tuple[int, ...]
) -> None:
    table = None
    for size in sizes:
        case = Case(role, size, packed, indirect)
        if case.role == "report" and not indirect and size < 4 * 32:
            continue
        if case.role == "walk" and size > 1024:
            continue  # buffers of 32 KiB each: more of them say nothing about rings
        found, buffers = measure(case, options, scalar=size <= SCALAR_MAX and options.full)
        table = table or _table(part, case.name)
        _row(part, table, case, found, buffers, "128 GiB")


def _table(part: Part, title: str) -> Table:
    return part.table(
        title, "queue size", "buffers", "batch", "numpy", "scalar", "C library", "C lean", "copy",
        "batch / library", "batch / lean",
    )  # fmt: skip


def _row(
    part: Part, table: Table, case: Case, found: dict[str, Samples], buffers: int, guest: str
) -> None:
    each = {
        name: part.keep(
            samples.per(buffers * 1e-9, "ns/buffer"),
            role=case.role,
            packed=case.packed,
            indirect=case.indirect,
            size=case.size,
            guest=guest,
        )
        for name, samples in found.items()
    }
    table.rows.append(
        [case.size, buffers]
        + [
            each[n].median if n in each else None
            for n in ("batch", "numpy", "scalar", "library", "lean", "copy")
        ]
        + [ratio(each["batch"], each["library"]), ratio(each["batch"], each["lean"])]
    )


def measure(
    case: Case, options: Options, *, scalar: bool, guest: int = GUEST, space: int = SPACE
) -> tuple[dict[str, Samples], int]:
    """All contenders on one case; their samples (seconds a turn), and buffers a turn."""
    memory = make_memory((0, guest))
    subjects = make_subjects(case, memory, space, scalar=scalar)
    for subject in subjects.values():
        subject.words[:] |= np.uint64(0)  # its pages are there, however few turns a case has
    buffers = subjects["batch"].buffers
    copy = Copy(subjects["batch"].bytes_touched)
    turns = max(7, min(options.turns, BUFFERS_A_CASE[options.form] // buffers))
    found = interleaved(
        {name: subject.turn for name, subject in subjects.items()} | {"copy": copy}, turns, warm=2
    )
    words = subjects["batch"].words
    for name, subject in subjects.items():
        assert (subject.words == words).all(), f"{case}: {name} has set other bits"
    memory.close()
    return found, buffers


def make_subjects(
    case: Case, memory: GuestMemory, space: int, *, scalar: bool
) -> dict[str, Subject]:
    """Return the contenders, each with its own ring and payloads."""
    arena = Arena(0x1000, space - 0x1000)

    def payloads() -> Payloads:
        return Payloads(case, memory, space)

    subjects: dict[str, Subject] = {
        "batch": OurSubject(case, memory, arena, payloads(), engine="batch"),
        "numpy": OurSubject(case, memory, arena, payloads(), engine="numpy"),
        "library": CSubject(case, memory, arena, payloads(), lean=False),
        "lean": CSubject(case, memory, arena, payloads(), lean=True),
    }
    if scalar:
        subjects["scalar"] = OurSubject(case, memory, arena, payloads(), engine="scalar")
    return subjects


def _warm(part: Part, options: Options) -> None:
    """Measure with a guest whose bitmap stays in the cache."""
    table = _table(part, "hint, split, direct, a guest of 4 GiB (bitmap in the cache)")
    for size in (256, 1024):
        case = Case("hint", size)
        found, buffers = measure(case, options, scalar=False, guest=WARM_GUEST, space=WARM_SPACE)
        _row(part, table, case, found, buffers, "4 GiB")


def _scalar(part: Part, options: Options) -> None:
    """Batch against scalar on queues of 1024 single-descriptor buffers."""
    table = part.table(
        "Batch engine against scalar engine, queue size 1024", "queue", "scalar / batch"
    )
    for role in ("hint", "inflate"):
        for packed in (False, True):
            case = Case(role, 1024, packed)
            found, buffers = measure(case, options, scalar=True)
            for name in ("batch", "scalar"):
                part.keep(
                    found[name].per(buffers * 1e-9, "ns/buffer"),
                    role=role,
                    packed=packed,
                    indirect=False,
                    size=1024,
                    guest="128 GiB",
                    table="scalar",
                )
            times = ratio(found["scalar"], found["batch"])
            table.rows.append([case.name, times])
            if role == "hint":
                part.goal(
                    f"batch engine at least 20 times the scalar one ({case.name}, 1024)",
                    times,
                    20,
                    at_most=False,
                    unit="x",
                )


def _judge(part: Part) -> None:
    def pick(name: str, **wanted: object) -> list[Samples]:
        return [
            s
            for s in part.samples
            if s.name == name
            and "table" not in s.params
            and all(s.params[k] == v for k, v in wanted.items())
        ]

    for role in ROLES:
        for packed in (False, True):
            at = {"role": role, "packed": packed, "indirect": False, "guest": "128 GiB"}
            kind = "packed" if packed else "split"
            batch, lib, lean = (pick(n, **at) for n in ("batch", "library", "lean"))
            big = [i for i, s in enumerate(batch) if int(str(s.params["size"])) >= 1024]
            worst_lib = max((ratio(batch[i], lib[i]), i) for i in big)
            worst_lean = max((ratio(batch[i], lean[i]), i) for i in big)
            part.goal(
                f"{role}, {kind}: batch no slower than the C library loop at 1024 and more "
                f"(worst: {batch[worst_lib[1]].params['size']})",
                worst_lib[0],
                1,
                unit="x",
            )
            part.goal(
                f"{role}, {kind}: batch at most 3 times the leanest C loop at 1024 and more "
                f"(worst: {batch[worst_lean[1]].params['size']})",
                worst_lean[0],
                3,
                unit="x",
            )
            if role in ("hint", "inflate"):
                flat = [s.median for s in batch if int(str(s.params["size"])) >= 256]
                c_flat = [s.median for s in lib if int(str(s.params["size"])) >= 256]
                part.goal(
                    f"{role}, {kind}: cost a buffer flat from 256 to 32768: maximum / median "
                    f"(C library: {max(c_flat) / sorted(c_flat)[len(c_flat) // 2]:.2f})",
                    max(flat) / sorted(flat)[len(flat) // 2],
                    1.5,
                    unit="x",
                )
    warm = {"role": "hint", "packed": False, "size": 1024, "guest": "4 GiB"}
    ours, c, bare = (pick(n, **warm)[0] for n in ("batch", "library", "lean"))
    part.goal("hint, split, 1024, guest of 4 GiB: batch / C library", ratio(ours, c), 1, unit="x")
    part.goal("hint, split, 1024, guest of 4 GiB: batch / C lean", ratio(ours, bare), 3, unit="x")
