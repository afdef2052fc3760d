# SPDX-License-Identifier: Apache-2.0
"""The walk queue end to end: what the guest pushes is what is free, by three independent witnesses.

They are the kernel's own ``/proc/kpageflags``, its ``/proc/buddyinfo``, and the guest's page
structures read from outside while the guest is stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.lab import NAMES, Machine, build_module
from tests.lab_tests.kmod_device import LocalDevice, as_bools, memory_of, same_length

from vballoon.snapshot.memmap import VerificationRefused, free_memory

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
SLICE = "/sys/module/vballoon_walk/parameters/slice_us"
TROUBLE = r"BUG|WARNING|Oops|Call Trace|Bad page|hung task|refcount"


@pytest.fixture(scope="module", params=NAMES)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kernel, and the module built for it."""
    out = tmp_path_factory.mktemp("kmod")
    return request.param, build_module(request.param, DRIVER, out).modules[0]


@contextmanager
def attached(module: tuple[str, Path], **hardware: Any) -> Iterator[tuple[Machine, LocalDevice]]:
    """Boot a guest with the module, and the device that it drives."""
    extra = hardware.pop("extra", [])
    transport = hardware.pop("transport", "vfio-user")
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module[1]}
    with (
        LocalDevice(transport) as device,
        Machine(
            kernel=module[0], files=files, extra=[*extra, *device.arguments()], **hardware
        ) as vm,
    ):
        vm.guest.load("virtio_pci")
        vm.guest.sh("dmesg -c >/dev/null; insmod /lab/vballoon_walk.ko")
        wait_for_layout(device)
        yield vm, device
        log = vm.guest.sh("dmesg")
        assert not re.findall(TROUBLE, log), log[-4000:]


def wait_for_layout(device: LocalDevice, other_than: int = 0) -> int:
    """Return the id of a layout that has arrived."""
    for _ in range(300):
        layout = device.balloon.walk_queue.memmap.layout
        if layout is not None and layout.header.layout_id != other_than:
            return int(layout.header.layout_id)
        time.sleep(0.1)
    raise AssertionError("no layout has come")


def fragmented(vm: Machine, mib: int) -> None:
    vm.guest.start(f"memhog {mib}", log="/run/hog.log", fifo="/run/hog")
    vm.guest.wait_for("grep -q filled /run/hog.log")
    vm.guest.sh("echo fragment >/run/hog")
    vm.guest.wait_for("tail -1 /run/hog.log | grep -q fragment")


def check_round(device: LocalDevice, done: dict[str, Any]) -> None:
    assert done["complete"], done
    assert done["bad-records"] == 0
    begin, end = device.balloon.walk_queue.begin, device.balloon.walk_queue.end
    assert begin is not None
    assert end is not None
    assert (end.result, begin.page_shift) == (0, 12)


def took_nothing(device: LocalDevice) -> bool:
    """Free memory is after the walk what it was before, but for what others did meanwhile.

    Page reporting, which the module does too, takes and gives 128 MiB at a time.
    """
    begin, end = device.balloon.walk_queue.begin, device.balloon.walk_queue.end
    assert begin is not None
    assert end is not None
    return abs(end.free_pages - begin.free_pages) < 256


def compare_with_kpageflags(vm: Machine, device: LocalDevice) -> None:
    """Compare in several attempts: a page may be in use or in a CPU's list during a walk."""
    seen = []
    for _ in range(5):
        before = vm.guest.pages()
        check_round(device, device.walk())
        before, walked, after = same_length(before, device.walked(), vm.guest.pages())
        # Free only between the two samples: what the program that takes them holds itself.
        wrong = int((walked & ~before & ~after).sum())
        assert wrong < 1024, f"{wrong} pushed pages were not free"
        seen.append(int((before & after & ~walked).sum()))
        if not seen[-1] and took_nothing(device):
            return
    raise AssertionError(f"free pages that were not pushed: {seen}")


def compare_with_memmap(vm: Machine, device: LocalDevice, attempts: int = 12) -> None:
    """To the page, at an instant at which nothing changed between the walk and the stop."""
    layout = device.balloon.walk_queue.memmap.layout
    assert layout is not None
    assert not layout.partial, "also where memory ends within what is looked up together"
    seen = []
    for _ in range(attempts):
        check_round(device, device.walk())
        found = device.free_now(vm)
        walked, free = same_length(device.walked(), as_bools(found.ranges))
        differ = int((walked != free).sum())
        seen.append(differ)
        if not differ and took_nothing(device):
            end = device.balloon.walk_queue.end
            assert end is not None
            # Also no block twice: a list that kept still was read once, in however many slices.
            assert (found.loose, found.pages, found.blocks) == (0, end.pages, end.blocks)
            return
    raise AssertionError(f"never equal, pages that differ: {seen}")


@pytest.mark.parametrize(
    ("memory", "smp", "nodes"), [(4096, 1, 1), (4096, 2, 1), (8192, 2, 1), (2048, 2, 2)]
)
def test_pushes_what_is_free(module: Any, memory: int, smp: int, nodes: int) -> None:
    with attached(module, memory=memory, smp=smp, nodes=nodes) as (vm, device):
        compare_with_kpageflags(vm, device)
        compare_with_memmap(vm, device)
        free = vm.guest.meminfo()["MemFree"] // 4096
        share = int(device.walked().sum()) / free
        end = device.balloon.walk_queue.end
        assert end is not None
        print(
            f"\n{module[0]}, {memory} MiB, {smp} CPU: {end.blocks} blocks in {end.ranges} ranges, "
            f"{share:.2%} of free memory, {end.duration_ns / 1e6:.2f} ms, longest hold "
            f"{end.longest_hold_ns / 1e3:.0f} us"
        )
        assert share > 0.99


@pytest.mark.parametrize("slice_us", [1, 50, 100_000])
def test_pushes_what_is_free_of_a_fragmented_guest(module: Any, slice_us: int) -> None:
    with attached(module, memory=1024, smp=2) as (vm, device):
        fragmented(vm, 700)
        vm.guest.sh(f"echo {slice_us} >{SLICE}")
        compare_with_kpageflags(vm, device)
        compare_with_memmap(vm, device)
        end = device.balloon.walk_queue.end
        assert end is not None
        assert end.blocks > 50_000
        assert (end.slices > 1000) == (slice_us == 1)
        print(
            f"\n{module[0]}, fragmented, slices of {slice_us} us: {end.blocks} blocks in "
            f"{end.slices} slices, {end.buffers} buffers, {end.duration_ns / 1e6:.1f} ms, "
            f"longest hold {end.longest_hold_ns / 1e3:.0f} us"
        )


@pytest.mark.parametrize("order", [3, 9, 10, 200])
def test_reports_no_smaller_block_than_asked_for(module: Any, order: int) -> None:
    with attached(module, memory=512) as (_vm, device):
        check_round(device, device.walk(order))
        begin = device.balloon.walk_queue.begin
        assert begin is not None
        applied = min(order, 10)
        assert (begin.min_order, begin.max_order) == (applied, 10)
        edges = device.ask(lambda: device.balloon.skipmap.extents("walked"))  # type: ignore[arg-type]
        assert len(edges)
        assert not (edges.rows() % np.uint64(1 << applied)).any()


def test_churn_outdates_a_part_of_what_was_pushed(module: Any) -> None:
    """Measured and printed: it is the reason for the safety rule, not a fault."""
    with attached(module, memory=1024, smp=2) as (vm, device):
        for seed in (1, 2):  # one for each CPU
            vm.guest.start(f"churn 250 300 {seed}", log=f"/run/churn{seed}.log")
        vm.guest.wait_for("test $(awk '/MemFree/ {print $2}' /proc/meminfo) -lt 600000")
        shares = {after: stale_shares(vm, device, after) for after in (0, 0.01, 0.1, 1)}
        for after, found in shares.items():
            print(
                f"\n{module[0]}, churn: of the pages pushed, no longer free {after} s after END: "
                f"{[f'{share:.3%}' for share in found]}"
            )
        assert max(shares[1]) > 0
        vm.guest.sh("killall churn")
        vm.guest.wait_for("test $(cat /run/churn*.log | grep -c steps) = 2")
        assert vm.guest.sh("cat /run/churn*.log").count(", 0 bad") == 2


def stale_shares(vm: Machine, device: LocalDevice, after: float) -> list[float]:
    """Of three rounds each: the share of what was pushed that is not free *after* seconds."""
    shares = []
    for _ in range(3):
        done = device.walk()
        time.sleep(after)
        free = device.free_now(vm)
        assert done["bad-records"] == 0
        walked, now = same_length(device.walked(), as_bools(free.ranges))
        shares.append(float((walked & ~now).sum() / walked.sum()))
    return shares


def test_new_round_ends_the_old_and_stop_ends_it_too(module: Any) -> None:
    with attached(module, memory=1024, smp=1) as (vm, device):
        fragmented(vm, 600)
        vm.guest.sh(f"echo 1 >{SLICE}")
        check_round(device, device.walk())
        numbers = [device.start_walk() for _ in range(5)]
        last: dict[str, Any] = {}
        while last.get("round") != numbers[-1]:
            last = device.ended.get(timeout=60)
        check_round(device, last)
        device.start_walk()
        device.ask(device.balloon.stop_walk)
        check_round(device, device.walk())


def test_waits_when_the_device_has_all_buffers(module: Any) -> None:
    """One buffer at a time: each must be used before the walk continues."""
    with attached(module, memory=1024, smp=2) as (vm, device):
        vm.guest.sh("rmmod vballoon_walk; insmod /lab/vballoon_walk.ko buffers=1")
        wait_for_layout(device)
        fragmented(vm, 700)
        compare_with_memmap(vm, device)
        end = device.balloon.walk_queue.end
        assert end is not None
        assert end.buffers > 20
        waits = vm.guest.sh("grep waits /sys/kernel/debug/vballoon_walk/virtio0/stats")
        assert int(waits.split()[1]) > 20


def test_trace_event_and_counters_tell_of_each_round(module: Any) -> None:
    with attached(module, memory=512) as (vm, device):
        vm.guest.sh("echo 1 >/sys/kernel/tracing/events/vballoon_walk/vbw_walk/enable")
        rounds = [device.walk(order)["round"] for order in (0, 5)]
        trace = vm.guest.sh("grep vbw_walk: /sys/kernel/tracing/trace").splitlines()
        end = device.balloon.walk_queue.end
        assert end is not None
        assert [int(re.findall(r"round=(\d+)", line)[0]) for line in trace] == rounds
        told = f"result=0 blocks={end.blocks} ranges={end.ranges} pages={end.pages}"
        assert told in trace[1]
        stats = vm.guest.sh("cat /sys/kernel/debug/vballoon_walk/virtio0/stats").splitlines()
        assert {"rounds 2", "aborted 0", f"blocks {end.blocks}", "result 0"} <= set(stats)


@pytest.mark.parametrize("transport", ["vhost-user", "vfio-user"])
def test_suspend_to_ram_starts_anew(module: Any, transport: str) -> None:
    with attached(module, memory=512, machine="pc", transport=transport) as (vm, device):
        check_round(device, device.walk())
        vm.guest.start("sh -c 'sleep 1; echo mem >/sys/power/state; echo awake'", log="/run/s.log")
        vm.monitor.wait_event("SUSPEND", timeout=30)
        vm.qmp("system_wakeup")
        vm.monitor.wait_event("WAKEUP", timeout=30)
        time.sleep(3)  # the agent's line is not one yet
        vm.guest.wait_for("grep -q awake /run/s.log")
        wait_for_layout(device)
        compare_with_memmap(vm, device)


def test_memory_pressure_during_rounds(module: Any) -> None:
    """The guest runs out of memory and kills a process; the guest and the walk continue."""
    with attached(module, memory=512, smp=2) as (vm, device):
        for number in range(4):  # each holds what it got; together more than there is
            vm.guest.start("memhog 150", log=f"/run/hog{number}.log", fifo=f"/run/hog{number}")
        killed = False
        for _ in range(300):
            device.walk()
            killed = "Killed process" in vm.guest.sh("dmesg")
            if killed:
                break
        assert killed
        compare_with_memmap(vm, device)
        vm.guest.sh("dmesg -c >/dev/null")  # an OOM report has a call trace


def test_loads_and_unloads_with_rounds_under_way(module: Any) -> None:
    with attached(module, memory=512, smp=2) as (vm, device):
        fragmented(vm, 200)
        for _ in range(8):
            vm.guest.sh(f"echo 1 >{SLICE}")
            device.start_walk()
            vm.guest.sh("rmmod vballoon_walk; insmod /lab/vballoon_walk.ko", timeout=30)
            wait_for_layout(device)
        compare_with_memmap(vm, device)


def test_layout_dies_with_the_module_and_outlives_the_device(module: Any) -> None:
    with attached(module, memory=512, machine="pc", transport="vhost-user") as (vm, device):
        compare_with_memmap(vm, device)
        layout = device.balloon.walk_queue.memmap.layout
        assert layout is not None
        memory = memory_of(vm)
        vm.qmp("device_del", id="b0")
        vm.monitor.wait_event("DEVICE_DELETED", device="b0")
        vm.qmp("stop")
        assert free_memory(layout, memory).pages > 50_000
        vm.qmp("cont")
        vm.guest.sh("rmmod vballoon_walk")
        vm.qmp("stop")
        with pytest.raises(VerificationRefused):
            free_memory(layout, memory)
        vm.qmp("cont")


def test_memory_that_comes_and_goes_makes_a_new_layout(module: Any) -> None:
    extra = ["-m", "slots=2,maxmem=4G"]
    with attached(
        module, memory=512, machine="pc", extra=extra, append="memhp_default_state=online_movable"
    ) as (vm, device):
        first = wait_for_layout(device)
        old = device.balloon.walk_queue.memmap.layout
        share = {"qom-type": "memory-backend-memfd", "id": "m1", "size": 512 << 20, "share": True}
        vm.qmp("object-add", **share)
        vm.qmp("device_add", driver="pc-dimm", id="d1", memdev="m1")
        vm.guest.wait_for("test $(grep -l online /sys/devices/system/memory/*/state | wc -l) -gt 4")
        second = wait_for_layout(device, first)
        compare_with_kpageflags(vm, device)
        compare_with_memmap(vm, device)
        assert device.walked().sum() > 150_000
        assert old is not None
        vm.qmp("stop")
        with pytest.raises(VerificationRefused, match="witness"):
            device.ask(lambda: free_memory(old, device.balloon.transport.memory))  # type: ignore[union-attr]
        vm.qmp("cont")
        vm.qmp("device_del", id="d1")
        vm.monitor.wait_event("DEVICE_DELETED", device="d1")
        # The unmapping voids a layout that came before it; a round brings it again.
        device.walk()
        wait_for_layout(device, second)
        compare_with_memmap(vm, device)
        assert device.walked().sum() < 131_072
