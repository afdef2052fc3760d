# SPDX-License-Identifier: Apache-2.0
"""Saving a guest: QEMU's own ways and ours, on guests with the same past."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.measure import Samples, clock
from tests.bench.options import Options
from tests.bench.record import Part
from tests.lab import Machine, build_module
from tests.lab.backend import Backend, negotiated, wait_until
from tests.lab.qemu import accelerator

from vballoon.control.client import ControlClient
from vballoon.snapshot.copy import copy_extents
from vballoon.snapshot.extents import data_extents
from vballoon.snapshot.process import Process
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Run
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import take

__all__ = ("run",)

MIB = 1 << 20
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
LIMIT = 128 << 20
"""Bytes a second: QEMU's default."""
LIMITED = "migrate at 128 MiB/s"
SETTLE_SECONDS = 8.0
"""After the guest has freed its memory: free page reporting has given back what it will."""


@dataclass(frozen=True)
class Size:
    """MiB of the guest, of data that it keeps, of random data that it frees; turns."""

    memory: int
    kept: int
    freed: int
    turns: int


SIZES = {
    "quick": Size(1024, 50, 300, 1),
    "short": Size(4096, 100, 1000, 1),
    "full": Size(4096, 100, 1000, 3),
}


@dataclass
class Saved:
    """What a way came to; bytes and seconds."""

    written: float
    total: float
    stopped: float
    used: float
    alone: float = 0.0
    """Copying the same bytes once more, with nothing around it."""
    whole: float = 0.0
    """Until all is written and the guest is as before; ours then makes checksums and waits for the
    disk, which QEMU does not."""


def run(options: Options) -> Part:
    """Every way once in each turn."""
    size = SIZES[options.form]
    part = Part("snapshot", "Saving a guest without its free memory")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        module = build_module("6.12", DRIVER, folder / "kmod").modules[0]
        found: dict[str, list[Saved]] = {}
        for _ in range(size.turns):
            for name, saved in _turn(size, module, folder / "saved"):
                found.setdefault(name, []).append(saved)
                print(f"  {name}: {saved.total:.2f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _write(part, size, found)
    return part


def _turn(size: Size, module: Path, place: Path) -> Iterator[tuple[str, Saved]]:
    """Each of QEMU's ways on a guest with the device that it needs, then ours."""
    own = "virtio-balloon-pci,id=own"
    hint = ["-object", "iothread,id=io0", "-device", f"{own},free-page-hint=on,iothread=io0"]
    reporting = ["-device", f"{own},free-page-reporting=on"]
    yield from _qemu(size, place, [], ("file:", "", ""), ("mapped-ram", "mapped-ram", ""))
    yield from _qemu(size, place, hint, ("hinting", "", "in-process "))
    yield from _qemu(size, place, reporting, ("reporting", "", "in-process "))
    yield "vballoon snapshot, stock driver", _ours(size, place, None)
    yield "vballoon snapshot, guest module", _ours(size, place, module)


@contextmanager
def _guest(size: Size, extra: list[str], driver: str, module: Path | None) -> Iterator[Machine]:
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module} if module else {}
    hardware: dict[str, Any] = {
        "kernel": "6.12",
        "machine": "pc",
        "memory": size.memory,
        "smp": 2,
        "backing": "file",
        "files": files,
        "extra": extra,
    }
    with Machine(**hardware) as vm:
        if driver:
            vm.guest.sh(driver)
        vm.guest.sh(f"keeper make /tmp/kept {size.kept}", timeout=200)
        vm.guest.sh(f"memhog {size.freed} </dev/null >/dev/null", timeout=400)
        time.sleep(SETTLE_SECONDS)
        yield vm


def _used(vm: Machine, size: Size) -> int:
    return size.memory * MIB - vm.guest.meminfo()["MemFree"]


def _qemu(
    size: Size, place: Path, devices: list[str], *ways: tuple[str, str, str]
) -> Iterator[tuple[str, Saved]]:
    """QEMU's migration of one guest into a file by each of *ways* (name, capability, more of the
    name), with its limit of bandwidth and without; the guest runs on in between.
    """
    with _guest(size, devices, "load virtio_balloon" if devices else "", None) as vm:
        for word, capability, more in ways:
            for name, bandwidth in ((LIMITED, LIMIT), ("migrate", 1 << 40)):
                if not (capability and bandwidth == LIMIT):
                    yield f"{name}, {more}{word}", _migrated(vm, size, place, capability, bandwidth)


def _migrated(vm: Machine, size: Size, place: Path, capability: str, bandwidth: int) -> Saved:
    used = _used(vm, size)
    vm.monitor.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
    if capability:
        wanted = {"capabilities": [{"capability": capability, "state": True}]}
        vm.monitor.execute("migrate-set-capabilities", wanted)
    vm.monitor.execute("migrate", {"uri": f"file:{place}"})
    answer = wait_until(lambda: _completed(vm), timeout=300, step=0.02)
    vm.qmp("cont")
    written = place.stat().st_blocks * 512
    place.unlink()
    total, stopped = answer["total-time"] / 1000, answer["downtime"] / 1000
    return Saved(written, total, stopped, used, whole=total)


def _completed(vm: Machine) -> Any:
    answer = vm.qmp("query-migrate")
    assert answer["status"] != "failed", answer
    return answer if answer["status"] == "completed" else None


def _ours(size: Size, place: Path, module: Path | None) -> Saved:
    driver = "load virtio_pci; insmod /lab/vballoon_walk.ko" if module else "load virtio_balloon"
    with Backend("vhost-user") as backend, _guest(size, backend.device("pc"), driver, module) as vm:
        wait_until(lambda: negotiated(backend))
        used = _used(vm, size)
        begin = clock()
        with (
            QemuVm(vm.qmp_socket) as monitor,
            ControlClient(backend.control_socket) as control,
            GuestSource.fetch(control, Process(monitor.pid)) as source,
        ):
            snapshot = Run(monitor, source, DirectoryStore(place))
            manifest = take(snapshot)
        total = clock() - begin
        written = sum((place / m.file).stat().st_blocks * 512 for m in manifest.memory)
        alone = median(
            [sum(_copy_alone(vm, place / m.file) for m in manifest.memory) for _ in range(3)]
        )
        took = snapshot.seconds()
        shutil.rmtree(place)
        written += manifest.state.bytes
        return Saved(written, total, took["stopped"], used, alone, total - took["finish"])


def _copy_alone(vm: Machine, copied: Path) -> float:
    """Seconds for copying the same extents of guest memory to a new file."""
    target = copied.with_suffix(".again")
    source = os.open(vm.ram[0].path, os.O_RDONLY)
    out = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        size = copied.stat().st_size
        with copied.open("rb") as file:
            extents = data_extents(file.fileno(), size)
        os.ftruncate(out, size)
        begin = clock()
        copy_extents(source, out, extents)
        return clock() - begin
    finally:
        os.close(source)
        os.close(out)
        target.unlink()


def _write(part: Part, size: Size, found: dict[str, list[Saved]]) -> None:
    part.notes += [
        (
            f"A guest of {size.memory} MiB with two processors ({accelerator()}), kernel 6.12; it "
            f"keeps {size.kept} MiB of files, and has written and freed {size.freed} MiB of random "
            "data. One guest for each device; it runs on between two ways. QEMU migrates into a "
            "file while it runs, with its default limit of bandwidth "
            "(128 MiB/s) or none. Total is `total-time` of query-migrate; ours has everything in "
            "it, from connecting to the manifest on the disk, checksums too; QEMU makes none and "
            "does not wait for the disk, so what compares is *guest whole again*. In use: all "
            "memory but MemFree; some of that was never touched."
        ),
    ]
    table = part.table(
        "Medians",
        "way",
        "written, MiB",
        "in use, MiB",
        "total, s",
        "guest whole again, s",
        "stopped, s",
        "the same bytes copied alone, s",
    )
    medians: dict[str, Saved] = {}
    for name, turns in found.items():
        kept = {
            what: part.keep(Samples(what, unit, [getattr(s, what) for s in turns]), way=name).median
            for what, unit in (
                ("written", "B"),
                ("used", "B"),
                ("total", "s"),
                ("stopped", "s"),
                ("alone", "s"),
                ("whole", "s"),
            )
        }
        medians[name] = Saved(**kept)
        table.rows.append(
            [name, kept["written"] / MIB, kept["used"] / MIB, kept["total"], kept["whole"],
             kept["stopped"], kept["alone"] or None]
        )  # fmt: skip
    ours = medians["vballoon snapshot, guest module"]
    part.goal("snapshot: bytes written / memory in use", ours.written / ours.used, 1.02)
    for word, text in ((LIMITED, "at its default bandwidth"), ("migrate", "at any bandwidth")):
        best = min(m.total for name, m in medians.items() if name.startswith(word))
        part.goal(
            f"snapshot: the fastest of QEMU's ways {text} / ours",
            best / ours.total,
            20,
            at_most=False,
        )
    part.goal("snapshot: stopped / copying alone", ours.stopped / ours.alone, 1.5)
