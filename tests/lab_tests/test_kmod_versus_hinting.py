# SPDX-License-Identifier: Apache-2.0
"""The walk beside the stock driver's free page hinting, in the same guest: time, coverage, cost."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.lab import NAMES, Machine, build_module
from tests.lab_tests.kmod_device import LocalDevice

from vballoon.skipmap import Provenance

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
MIB = 1 << 20
ROUNDS = 3
WALKS = 10
"""Counts of pages scatter by some pages; that all walks are above all controls by chance alone is
then unlikely (1 in 180000)."""


@dataclass
class Round:
    """One way of asking: seconds to a complete bitmap, share of free memory, MiB taken."""

    seconds: float
    share: float
    taken_mib: float
    allocated: int


def allocations(vm: Machine) -> int:
    """Pages handed out by the guest's allocator since boot."""
    text = vm.guest.sh("cat /proc/vmstat")
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("pgalloc_"))


def free_bytes(vm: Machine) -> int:
    """Free memory; the largest of some looks, as page reporting takes 128 MiB away at times."""
    return max(vm.guest.meminfo()["MemFree"] for _ in range(5))


def pages(device: LocalDevice, provenance: Provenance) -> int:
    return device.ask(lambda: device.balloon.skipmap.count(provenance))


def hint(vm: Machine, device: LocalDevice) -> Round:
    """Run a round of the stock driver, whose pages are held until the rest was read."""
    free, before = free_bytes(vm), allocations(vm)
    started = time.monotonic()
    device.ask(lambda: device.balloon.start_hinting(hold=True))
    done = device.ended.get(timeout=120)
    seconds = time.monotonic() - started
    assert done["complete"], done
    taken = free - vm.guest.meminfo()["MemFree"]
    share = pages(device, Provenance.HINTED) * 4096 / free
    made = allocations(vm) - before
    device.ask(device.balloon.stop_hinting)
    vm.guest.wait_for(
        f"test $(awk '/MemFree/ {{print $2}}' /proc/meminfo) -gt {free // 1024 - 65536}"
    )
    return Round(seconds, share, taken / MIB, made)


def walk(vm: Machine, device: LocalDevice) -> Round:
    free, before = free_bytes(vm), allocations(vm)
    started = time.monotonic()
    done = device.walk()
    seconds = time.monotonic() - started
    assert done["complete"], done
    begin, end = device.balloon.walk_queue.begin, device.balloon.walk_queue.end
    assert begin is not None
    assert end is not None
    share = pages(device, Provenance.WALKED) * 4096 / free
    taken = (begin.free_pages - end.free_pages) * 4096 / MIB
    return Round(seconds, share, taken, allocations(vm) - before)


def idle(vm: Machine) -> int:
    """Measure the control: pages that the counting itself allocates during a walk's time."""
    before = allocations(vm)
    time.sleep(0.05)
    return allocations(vm) - before


def drain(events: queue.Queue[Any]) -> None:
    while not events.empty():
        events.get()


def best(rounds: list[Round]) -> Round:
    return min(rounds, key=lambda r: r.seconds)


def show(label: str, way: str, r: Round) -> None:
    print(
        f"{label:24} {way:8} {r.seconds * 1e3:9.2f} ms  {r.share:8.2%} of free memory  "
        f"{r.taken_mib:8.1f} MiB taken  {r.allocated:8} pages allocated"
    )


@pytest.mark.parametrize("fragment", [False, True], ids=["fresh", "fragmented"])
@pytest.mark.parametrize("name", NAMES)
def test_walk_beside_hinting(name: str, fragment: bool, tmp_path: Path) -> None:
    module = build_module(name, DRIVER, tmp_path).modules[0]
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module}
    with (
        LocalDevice() as device,
        Machine(kernel=name, memory=4096, smp=2, files=files, extra=device.arguments()) as vm,
    ):
        if fragment:
            vm.guest.start("memhog 3000", log="/run/hog.log", fifo="/run/hog")
            vm.guest.wait_for("grep -q filled /run/hog.log", timeout=300)
            vm.guest.sh("echo fragment >/run/hog")
            vm.guest.wait_for("tail -1 /run/hog.log | grep -q fragment", timeout=300)
        vm.guest.load("virtio_balloon")
        drain(device.ended)
        hinted = best([hint(vm, device) for _ in range(ROUNDS)])
        vm.guest.sh("rmmod virtio_balloon; insmod /lab/vballoon_walk.ko; sleep 1")
        turns = [(walk(vm, device), idle(vm)) for _ in range(WALKS)]
        walked = best([turn for turn, _ in turns])
        print()
        label = f"{name}, {'fragmented' if fragment else 'fresh'}, 4 GiB"
        show(label, "hinting", hinted)
        show(label, "walk", walked)
        assert 0.99 < walked.share < 1.01
        assert walked.taken_mib < 1
        made, nothing = sorted(turn.allocated for turn, _ in turns), sorted(n for _, n in turns)
        print(f"{label:24} pages allocated around a walk {made}, around no walk {nothing}")
        assert made[0] <= nothing[-1], "the walk itself allocates nothing"
        print(f"{label:24} hinting takes {hinted.seconds / walked.seconds:.0f} times as long")
        if fragment:
            # Hinting sees the large blocks, and what the kernel compacts into some meanwhile.
            assert hinted.share < walked.share - 0.1
            assert hinted.seconds > walked.seconds
        else:
            assert hinted.seconds / walked.seconds > 20
            assert hinted.taken_mib > 2000
