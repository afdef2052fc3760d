# SPDX-License-Identifier: Apache-2.0
"""QEMU's own balloon and ours, in one guest: inflate, deflate, report, hint."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.bench.measure import Samples, clock, ratio
from tests.bench.options import Options
from tests.bench.process import cpu_seconds
from tests.bench.record import Part
from tests.lab import Machine
from tests.lab.backend import Backend, wait_until
from tests.lab.qemu import accelerator

__all__ = ("run",)

MIB = 1 << 20
GIB = 1 << 30
HINT_BLOCK = 4 * MIB
"""What the stock driver hints with one buffer: a block of the largest order."""
IN_PROCESS = "in-process"
FLOOR = "nothing freed"
HINTS = ("hint", "hint, MiB", "hint, each GiB")
AGAIN = "hint after use"
"""Rounds in a guest most of whose memory has been used since it was booted."""
DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"


@dataclass(frozen=True)
class Size:
    """How large and how often."""

    memory: int
    inflate: int
    freed: int
    share: float
    """Of what was freed: until so much has come back."""
    turns: int


SIZES = {
    "quick": Size(1024, 512, 256, 0.5, 2),
    "short": Size(2048, 1024, 512, 0.7, 3),
    "full": Size(4096, 2048, 1024, 0.8, 5),
}


@dataclass
class Device:
    """A balloon device of the guest: where it is, how to command it, who works for it."""

    name: str
    slot: int
    balloon: Callable[[int], None]
    actual: Callable[[], int]
    backend: Backend | None = None
    found: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """The guest with all three devices; the driver is bound to one of them at a time."""

    def __init__(self, vm: Machine, devices: list[Device], size: Size) -> None:
        self.vm, self.devices, self.size = vm, devices, size
        # By hand: only one device at a time may report free pages, and a driver that gives up on
        # the others leaves them in a state from which it does not recover.
        vm.guest.sh("echo 0 >/sys/bus/virtio/drivers_autoprobe")
        vm.guest.load("virtio_balloon")

    @contextlib.contextmanager
    def bound(self, device: Device) -> Iterator[None]:
        """Bind the driver to *device* and to no other."""
        pci = f"/sys/bus/pci/devices/0000:00:{device.slot:02x}.0"
        self.vm.guest.wait_for(f"[ -e {pci}/virtio*/features ]")
        node = self.vm.guest.sh(f"cd {pci} && echo virtio*").strip()
        self.vm.guest.sh(f"echo {node} >{DRIVER}/bind")
        self.vm.guest.report_everything()
        try:
            yield
        finally:
            self.vm.guest.sh(f"echo {node} >{DRIVER}/unbind")

    def plug(self, device: Device) -> None:
        """Put one of ours in, to stay."""
        assert device.backend is not None
        properties = device.backend.properties("pc", "", f"ours-{device.slot}")
        if "chardev" in properties:
            address = {"type": "unix", "data": {"path": str(device.backend.socket)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            self.vm.qmp("chardev-add", id=properties["chardev"], backend=backend)
        self.vm.monitor.execute("device_add", properties | {"addr": hex(device.slot)})

    def cpu(self, device: Device) -> dict[str, float]:
        """CPU seconds so far: QEMU's virtual processors, the rest of QEMU, our server."""
        vcpu = rest = 0.0
        for task in Path(f"/proc/{self.vm.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                seconds = int((task / "schedstat").read_text().split()[0]) * 1e-9
                if (task / "comm").read_text().startswith("CPU"):
                    vcpu += seconds
                else:
                    rest += seconds
        ours = cpu_seconds(device.backend.pid) if device.backend else 0.0
        return {"guest CPU": vcpu, "device CPU": rest + ours, "of it the server": ours}

    @contextlib.contextmanager
    def timed(self, device: Device, what: str) -> Iterator[None]:
        """Keep the time and the CPU time of the block."""
        cpu, start = self.cpu(device), clock()
        yield
        seconds, after = clock() - start, self.cpu(device)
        device.found.setdefault(what, []).append(seconds)
        for name, value in after.items():
            device.found.setdefault(f"{what}, {name}", []).append(value - cpu[name])

    def inflate_and_deflate(self, device: Device) -> None:
        """To the target and back."""
        full = self.size.memory * MIB
        small = full - self.size.inflate * MIB
        self.touch()
        resident = self.vm.resident()
        with self.timed(device, "inflate"):
            device.balloon(small)
            wait_until(lambda: device.actual() <= small, timeout=300, step=0.02)
        gone = resident - self.vm.resident()
        device.found.setdefault("resident after inflate", []).append(self.vm.resident() / MIB)
        device.found.setdefault("given back by inflate", []).append(gone / MIB)
        with self.timed(device, "deflate"):
            device.balloon(full)
            wait_until(lambda: device.actual() >= full, timeout=300, step=0.02)

    def touch(self) -> None:
        """Have the guest write to most of its memory and free it."""
        mib = self.size.inflate + self.size.inflate // 4
        self.vm.guest.sh(f"memhog {mib} pattern </dev/null >/dev/null", timeout=300)

    def report(self, device: Device) -> None:
        """Have the guest free memory, and wait until most of it is given back."""
        guest = self.vm.guest
        guest.start(f"memhog {self.size.freed} pattern", log="/run/hog.log", fifo="/run/hog")
        guest.wait_for("grep -q filled /run/hog.log", timeout=300)
        full = self.vm.resident()
        goal = full - self.size.share * self.size.freed * MIB
        with self.timed(device, "report"):
            guest.sh("echo free >/run/hog")
            wait_until(lambda: self.vm.resident() <= goal, timeout=120, step=0.02)
        device.found.setdefault("resident after report", []).append(self.vm.resident() / MIB)
        guest.sh("kill %1 2>/dev/null; killall memhog; rm -f /run/hog /run/hog.log; true")

    def hint(self, device: Device, what: str) -> None:
        """Run a hinting round on this device."""
        assert device.backend is not None
        backend = device.backend
        with self.timed(device, what):
            backend.ctl("start-hinting")
            backend.events.wait_event("ROUND_COMPLETED", timeout=120)
        pages = backend.ctl("query-skip-bitmap")["pages"]["hinted"]
        seconds = device.found[what][-1] * GIB / (pages * 4096)
        device.found.setdefault(f"{what}, MiB", []).append(pages * 4096 / MIB)
        device.found.setdefault(f"{what}, each GiB", []).append(seconds)
        time.sleep(1)


def run(options: Options) -> Part:
    """Everything in one guest."""
    size = SIZES[options.form]
    part = Part("qemu", "Beside QEMU's own balloon, in the same guest")
    with (
        Backend("vhost-user", "--features=-FREE_PAGE_WALK", config_size=16) as vhost,
        Backend("vhost-user", "--features=-FREE_PAGE_WALK", "--no-discard", config_size=16) as idle,
        Backend("vfio-user", "--features=-FREE_PAGE_WALK") as vfio,
        Machine(kernel="6.12", machine="pc", memory=size.memory, smp=1, extra=_own_device()) as vm,
    ):
        bench = Bench(vm, _contenders(vm, vhost, vfio), size)
        own, ours, other = bench.devices
        floor = _ours(FLOOR, 0x13, idle)
        _hint_in_process(bench, own)
        bench.plug(ours)
        _hint_fresh(bench, ours)
        bench.plug(floor)
        counters = _interleave(bench, own, ours, floor)
        # A vfio-user device keeps QEMU's own balloon from discarding for as long as it is there,
        # so it comes last, and has its turns beside our other transport.
        bench.plug(other)
        first = {name: list(values) for name, values in ours.found.items()}
        ours.found.clear()
        counters |= _interleave(bench, ours, other)
        second, ours.found = ours.found, first
        version = vm.qmp("query-version")["qemu"]
    _write(part, bench, second, counters, version)
    _write_floor(part, own, ours, floor)
    return part


def _hint_fresh(bench: Bench, device: Device) -> None:
    """Measure rounds in a guest that has hardly used its memory, like the in-process ones."""
    with bench.bound(device):
        for _ in range(bench.size.turns):
            bench.hint(device, "hint")


def _interleave(
    bench: Bench, one: Device, two: Device, floor: Device | None = None
) -> dict[str, dict[str, Any]]:
    """Run turns of two devices and return the queue counters of the last turn of each.

    *floor* only inflates and deflates, between them.
    """
    kept = [{what: list(values) for what, values in d.found.items()} for d in (one, two)]
    _turns(bench, two)  # the first time memory is given back and taken again: not kept
    one.found, two.found = kept
    counters = {}
    for turn in range(bench.size.turns):
        for device in (one, two) if turn % 2 else (two, one):
            counters[device.name] = _turns(bench, device)
            if floor is not None and device is one:
                with bench.bound(floor):
                    bench.inflate_and_deflate(floor)
    return counters


def _turns(bench: Bench, device: Device) -> dict[str, Any]:
    with bench.bound(device):
        before = _queues(device)
        bench.inflate_and_deflate(device)
        bench.report(device)
        if device.backend is not None:
            bench.hint(device, AGAIN)
        return {
            name: {k: after[k] - before.get(name, {}).get(k, 0) for k in COUNTED}
            for name, after in _queues(device).items()
        }


COUNTED = ("taken", "kicked", "notified")
NAMES = {0: "inflate", 1: "deflate", 2: "stats", 3: "hint", 4: "report"}


def _queues(device: Device) -> dict[str, dict[str, int]]:
    if device.backend is None:
        return {}
    found = device.backend.ctl("query-status")["queues"]
    return {NAMES[q["index"]]: q for q in found if q["state"] == "running"}


def _own_device() -> list[str]:
    own = {
        "driver": "virtio-balloon-pci",
        "id": "own",
        "addr": "0x10",
        "free-page-reporting": True,
        "free-page-hint": True,
        "iothread": "io0",
    }
    return [
        "-msg", "timestamp=on", "-object", "iothread,id=io0", "-device", json.dumps(own),
    ]  # fmt: skip


def _ours(name: str, slot: int, backend: Backend) -> Device:
    return Device(
        name,
        slot,
        lambda value: backend.ctl("balloon", value=value) and None,
        lambda: int(backend.ctl("query-balloon")["actual"]),
        backend,
    )


def _contenders(vm: Machine, vhost: Backend, vfio: Backend) -> list[Device]:
    own = Device(
        IN_PROCESS,
        0x10,
        lambda value: vm.qmp("balloon", value=value) and None,
        lambda: int(vm.qmp("query-balloon")["actual"]),
    )
    return [own, _ours("vhost-user", 0x11, vhost), _ours("vfio-user", 0x12, vfio)]


def _hint_in_process(bench: Bench, own: Device) -> None:
    """QEMU hints at the beginning of a migration without an event; its trace of buffers shows it.

    Our devices cannot be migrated, so they are not plugged in yet.  The end of the migration ends
    the round, however far it came, so what counts is the time for each GiB.
    """
    vm = bench.vm
    found = {what: own.found.setdefault(what, []) for what in HINTS}
    trace = vm.folder / "trace.log"
    vm.qmp("human-monitor-command", command_line=f"logfile {trace}")
    with bench.bound(bench.devices[0]):
        for _ in range(bench.size.turns):
            begin = trace.stat().st_size if trace.exists() else 0
            _trace(vm, True)
            start = time.time()
            vm.qmp("migrate", uri="exec:cat >/dev/null")
            wait_until(lambda: vm.qmp("query-migrate")["status"] == "completed", timeout=120)
            _trace(vm, False)
            vm.qmp("cont")
            time.sleep(1)
            with open(trace) as lines:
                lines.seek(begin)
                stamps = [_stamp(line) for line in lines if "Z virtqueue_pop" in line]
            burst = _burst(stamps)
            # the command ids at both ends are buffers of their own
            hinted = (len(burst) - 2) * HINT_BLOCK
            found["hint"].append(burst[-1] - start)
            found["hint, MiB"].append(hinted / MIB)
            found["hint, each GiB"].append((burst[-1] - start) * GIB / hinted)


def _trace(vm: Machine, enable: bool) -> None:
    vm.monitor.execute("trace-event-set-state", {"name": "virtqueue_pop", "enable": enable})


def _stamp(line: str) -> float:
    return datetime.fromisoformat(line.split()[0]).timestamp()


def _burst(stamps: list[float]) -> list[float]:
    """Return the first buffers, up to a pause of a second."""
    assert len(stamps) > 2, "no buffer was traced"
    for i, (one, following) in enumerate(itertools.pairwise(stamps)):
        if following - one > 1:
            return stamps[: i + 1]
    return stamps


def _write(
    part: Part,
    bench: Bench,
    second: dict[str, list[float]],
    counters: dict[str, Any],
    version: dict[str, int],
) -> None:
    size = bench.size
    number = ".".join(str(version[k]) for k in ("major", "minor", "micro"))
    part.notes += [
        (
            f"QEMU {number}, Debian's kernel 6.12 with its stock driver, a guest of {size.memory} "
            f"MiB with one processor ({accelerator()}). One guest has all devices, and the driver "
            "is bound to one of them at a time, in turns: in-process and vhost-user, then "
            "vhost-user and vfio-user (while a vfio-user device is there, QEMU's own balloon "
            "discards nothing). vfio-user / in-process is the product of both ratios."
        ),
        (
            f"Inflate and deflate: {size.inflate} MiB, all of it written to before; until `actual` "
            f"is the target. Report: {size.freed} MiB freed by a process, until {size.share:.0%} "
            "of it have "
            "left the host's memory (some tens of MiB stay in lists of the processor that freed "
            "them; the driver waits two seconds before it reports). Hint: ours from the command "
            "to ROUND_COMPLETED; QEMU's from the migration's start to the last buffer of its burst "
            "(traced); both in the freshly booted guest, ours after QEMU's, and compared for each "
            "GiB hinted, since QEMU's round ends with its migration."
        ),
        (
            "Device CPU: of QEMU without its virtual processors, and of our server. That is where "
            "the work of a device is done; the time of the guest depends on the accelerator."
        ),
    ]
    kept = {
        d.name: {k: part.keep(Samples(k, _unit(k), v), device=d.name) for k, v in d.found.items()}
        for d in bench.devices
    }
    again = {
        k: part.keep(Samples(k, _unit(k), v), device="vhost-user", beside="vfio-user")
        for k, v in second.items()
    }
    ratios = _ratios(kept, again)
    table = part.table(
        "Medians",
        "what",
        "in-process",
        "vhost-user",
        "vfio-user",
        "vhost-user / in-process",
        "vfio-user / vhost-user",
        "vfio-user / in-process",
    )
    for what in kept["vhost-user"]:
        cells = [kept[d.name][what].median if what in kept[d.name] else None for d in bench.devices]
        unit = "" if "MiB" in what else f", {_unit(what)}"
        table.rows.append([what + unit, *cells, *ratios[what]])
    _judge(part, ratios)
    economy = part.table(
        "Kicks and interrupts of our devices in their last turn (stock driver)",
        "transport",
        "queue",
        "buffers",
        "kicks handled",
        "interrupts",
    )
    for name, queues in counters.items():
        for queue, q in queues.items():
            economy.rows.append([name, queue, q["taken"], q["kicked"], q["notified"]])


def _write_floor(part: Part, own: Device, ours: Device, floor: Device) -> None:
    """Measure inflating without discarding: the guest's work and the round trips."""
    table = part.table(
        "The floor: vhost-user with `--no-discard`, in the same turns",
        "what",
        "in-process",
        "vhost-user",
        FLOOR,
        f"{FLOOR} / in-process",
        f"vhost-user / {FLOOR}",
        note="No device can be faster than the guest hands pages over; where the floor is above "
        "half of in-process, half cannot be reached.",
    )
    for what in ("inflate", "deflate"):
        times = [Samples(what, "s", d.found[what]) for d in (own, ours, floor)]
        part.keep(times[2], device=FLOOR)
        table.rows.append(
            [
                what + ", s",
                *(t.median for t in times),
                ratio(times[2], times[0]),
                ratio(times[1], times[2]),
            ]
        )


def _ratios(
    kept: dict[str, dict[str, Samples]], again: dict[str, Samples]
) -> dict[str, tuple[float | None, float, float | None]]:
    """vhost-user / in-process, vfio-user / vhost-user, and their product."""
    found = {}
    for what, mine in kept["vhost-user"].items():
        theirs = kept[IN_PROCESS].get(what)
        first = ratio(mine, theirs) if theirs and all(theirs.values) else None
        # Over vfio-user there are rounds after use alone, and what they are beside ours.
        state = what.replace("hint", AGAIN, 1) if what not in again else what
        second = ratio(kept["vfio-user"][state], again[state])
        found[what] = (first, second, first * second if first is not None else None)
    return found


def _unit(what: str) -> str:
    return "MiB" if "resident" in what or "given" in what or "MiB" in what else "s"


def _judge(part: Part, ratios: dict[str, tuple[float | None, float, float | None]]) -> None:
    for name, column in (("vhost-user", 0), ("vfio-user", 2)):
        found = {what: row[column] for what, row in ratios.items()}
        part.goal(
            f"{name}: inflate at least 2 times faster than in-process (time of ours / theirs)",
            found["inflate"] or 0,
            0.5,
            unit="x",
        )
        part.goal(
            f"{name}: CPU time of the device for it (ours / theirs)",
            found["inflate, device CPU"] or 0,
            0.5,
            unit="x",
        )
        for what in ("deflate", "report", "hint, each GiB"):
            part.goal(
                f"{name}: {what} no slower than in-process (within 5 %)",
                found[what] or 0,
                1.05,
                unit="x",
            )
