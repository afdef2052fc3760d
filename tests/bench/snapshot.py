# SPDX-License-Identifier: Apache-2.0
"""Saving a guest: QEMU's own ways and ours, each on a fresh guest with the same past."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import Snapshot

__all__ = ("run",)

MIB = 1 << 20
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
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
    "quick": Size(1024, 50, 300, 1), "short": Size(4096, 100, 1000, 1),
    "full": Size(4096, 100, 1000, 3),
}  # fmt: skip


@dataclass
class Saved:
    """What a way came to; bytes and seconds."""

    written: float
    total: float
    stopped: float
    used: float
    alone: float = 0.0
    """Copying the same bytes once more, with nothing around it."""


def run(options: Options) -> Part:
    """Every way once in each turn."""
    size = SIZES[options.form]
    part = Part("snapshot", "Saving a guest without its free memory")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        module = build_module("6.12", DRIVER, folder / "kmod").modules[0]
        found: dict[str, list[Saved]] = {}
        for _ in range(size.turns):
            for name, way in _ways(size, module):
                place = folder / "saved"
                found.setdefault(name, []).append(way(place))
                shutil.rmtree(place, ignore_errors=True)
                place.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _write(part, size, found)
    return part


def _ways(size: Size, module: Path) -> list[tuple[str, Callable[[Path], Saved]]]:
    own = "virtio-balloon-pci,id=own"
    hint = ["-object", "iothread,id=io0", "-device", f"{own},free-page-hint=on,iothread=io0"]
    reporting = ["-device", f"{own},free-page-reporting=on"]
    return [
        (f"{LIMITED} file:", lambda p: _qemu(size, p, [], limited=True)),
        (f"{LIMITED}, hinting", lambda p: _qemu(size, p, hint, limited=True)),
        (f"{LIMITED}, reporting", lambda p: _qemu(size, p, reporting, limited=True)),
        ("migrate file:", lambda p: _qemu(size, p, [])),
        ("migrate, mapped-ram", lambda p: _qemu(size, p, [], "mapped-ram")),
        ("migrate, in-process hinting", lambda p: _qemu(size, p, hint)),
        ("migrate, in-process reporting", lambda p: _qemu(size, p, reporting)),
        ("vballoon snapshot, stock driver", lambda p: _ours(size, p, None)),
        ("vballoon snapshot, guest module", lambda p: _ours(size, p, module)),
    ]


@contextmanager
def _guest(size: Size, extra: list[str], driver: str, module: Path | None) -> Iterator[Machine]:
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module} if module else {}
    hardware: dict[str, Any] = {
        "kernel": "6.12", "machine": "pc", "memory": size.memory, "smp": 2, "backing": "file",
        "files": files, "extra": extra,
    }  # fmt: skip
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
    size: Size, place: Path, devices: list[str], capability: str = "", *, limited: bool = False
) -> Saved:
    """QEMU's migration into a file, with or without its limit of bandwidth."""
    with _guest(size, devices, "load virtio_balloon" if devices else "", None) as vm:
        used = _used(vm, size)
        if not limited:
            vm.monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        if capability:
            vm.monitor.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": capability, "state": True}]},
            )
        vm.monitor.execute("migrate", {"uri": f"file:{place}"})
        answer = wait_until(lambda: _completed(vm), timeout=300, step=0.02)
        return Saved(
            place.stat().st_blocks * 512,
            answer["total-time"] / 1000,
            answer["downtime"] / 1000,
            used,
        )


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
            GuestSource.fetch(control) as source,
        ):
            snapshot = Snapshot(monitor, source, DirectoryStore(place))
            manifest = snapshot.take()
        total = clock() - begin
        written = sum((place / m.file).stat().st_blocks * 512 for m in manifest.memory)
        alone = sum(_copy_alone(vm, place / m.file) for m in manifest.memory)
        return Saved(
            written + manifest.state.bytes, total, snapshot.seconds()["stopped"], used, alone
        )


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
            "data. QEMU migrates into a file while it runs, with its default limit of bandwidth "
            "(128 MiB/s) or none. Total is `total-time` of query-migrate; ours has everything in "
            "it, from connecting to the manifest on the disk, checksums too. In use: all memory "
            "but MemFree; some of that was never touched."
        ),
    ]
    table = part.table(
        "Medians", "way", "written, MiB", "in use, MiB", "total, s", "stopped, s",
        "the same bytes copied alone, s",
    )  # fmt: skip
    medians: dict[str, Saved] = {}
    for name, turns in found.items():
        kept = {
            what: part.keep(Samples(what, unit, [getattr(s, what) for s in turns]), way=name).median
            for what, unit in (
                ("written", "B"), ("used", "B"), ("total", "s"), ("stopped", "s"), ("alone", "s"),
            )
        }  # fmt: skip
        medians[name] = Saved(**kept)
        table.rows.append(
            [name, kept["written"] / MIB, kept["used"] / MIB, kept["total"], kept["stopped"],
             kept["alone"] or None]
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
