# SPDX-License-Identifier: Apache-2.0
"""What the guest module does where the device, the kernel or the guest's memory lets it down."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab import NAMES, Machine, build_module
from tests.lab_tests.kmod_device import LocalDevice

from vballoon.balloon.device import ALL_FEATURES
from vballoon.snapshot.memmap import VerificationRefused, free_memory
from virtio_formats.virtio.balloon import BalloonFeature

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
STATS = "/sys/kernel/debug/vballoon_walk/virtio0/stats"
TROUBLE = r"BUG|WARNING|Oops|Call Trace|Bad page|hung task|refcount"
INTERRUPTS = "awk '/virtio/ {for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i} END {print n}'"


@pytest.fixture(scope="module", params=NAMES)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kernel, and the module built for it."""
    out = tmp_path_factory.mktemp("kmod")
    return request.param, build_module(request.param, DRIVER, out).modules[0]


@contextmanager
def attached(
    module: tuple[str, Path],
    device: LocalDevice,
    **hardware: Any,
) -> Iterator[Machine]:
    """Boot a guest with the module; check at the end that its log is clean."""
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module[1]}
    extra = [*hardware.pop("extra", []), *device.arguments()]
    with device, Machine(kernel=module[0], files=files, extra=extra, **hardware) as vm:
        vm.guest.load("virtio_pci")
        vm.guest.sh("dmesg -c >/dev/null; insmod /lab/vballoon_walk.ko")
        yield vm
        log = vm.guest.sh("dmesg")
        assert not re.findall(TROUBLE, log), log[-4000:]


def stats(vm: Machine) -> dict[str, int]:
    lines = vm.guest.sh(f"cat {STATS}").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def wait_for(vm: Machine, counter: str, least: int) -> int:
    """Return the value of a counter that has reached *least*."""
    for _ in range(300):
        found = stats(vm)[counter]
        if found >= least:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{counter} stays at {found}, expected {least} or more")


def negotiated(vm: Machine) -> set[int]:
    bits = vm.guest.sh("cat /sys/bus/virtio/devices/virtio0/features").strip()
    return {number for number, bit in enumerate(bits) if bit == "1"}


def test_no_free_page_is_named_where_its_contents_matter(module: Any) -> None:
    """A device that does not offer PAGE_POISON cannot know what the guest expects in free pages.

    Here zeros are expected: Debian's cloud kernels are built without CONFIG_PAGE_POISONING.
    """
    append = "init_on_free=1"
    lone = LocalDevice(features=ALL_FEATURES & ~BalloonFeature.PAGE_POISON)
    named = {3, 5, 63}
    with attached(module, lone, memory=512, append=append) as vm:
        assert not negotiated(vm) & named
        assert stats(vm)["walk_queue"] == 0
    with attached(module, LocalDevice(), memory=512, append=append) as vm:
        assert negotiated(vm) >= {*named, 4}


def test_hinting_interrupts_when_the_queue_is_full_only(module: Any) -> None:
    device = LocalDevice()
    with attached(module, device, memory=2048) as vm:
        before = int(vm.guest.sh(f"{INTERRUPTS} /proc/interrupts"))
        device.ask(lambda: device.balloon.start_hinting(hold=True))
        assert device.ended.get(timeout=60)["complete"]
        interrupts = int(vm.guest.sh(f"{INTERRUPTS} /proc/interrupts")) - before
        blocks = wait_for(vm, "hinted_blocks", 1)
        print(f"\n{module[0]}: {interrupts} interrupts for {blocks} hinted blocks")
        assert blocks > 250
        # One for the configuration change; some where the device did not keep pace.
        assert interrupts < blocks / 5
        device.ask(device.balloon.stop_hinting)


def test_a_host_that_takes_no_hints_stops_no_walk(module: Any) -> None:
    device = LocalDevice()
    device.balloon._hint_queue.handle = lambda *_: None  # type: ignore[method-assign]
    with attached(module, device, memory=1024) as vm:
        wait_for(vm, "layouts_sent", 1)
        device.ask(lambda: device.balloon.start_hinting(hold=True))
        wait_for(vm, "hinted_blocks", 64)  # the queue is full
        done = device.walk(timeout=60)
        assert done["complete"]
        # The round of hints is over after a time, and its pages come back at the end.
        device.ask(device.balloon.stop_hinting)
        vm.guest.wait_for(f"grep -q 'hinted_blocks 0' {STATS}")


def test_balloon_without_buffers_works_without_walks(module: Any) -> None:
    """Free memory in single pages only: not one buffer of 32 KiB can be allocated."""
    device = LocalDevice()
    with attached(module, device, memory=512) as vm:
        vm.guest.sh("rmmod vballoon_walk")
        vm.guest.start("memhog 380", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        vm.guest.sh("echo fragment >/run/hog")
        vm.guest.wait_for("grep -q fragment /run/hog.log")
        # All larger blocks that are left, by a number of buffers that cannot be had.
        vm.guest.sh("insmod /lab/vballoon_walk.ko buffers=1024")
        assert vm.guest.sh("ls /sys/bus/virtio/drivers/vballoon_walk | grep virtio0")


def test_memory_that_comes_in_steps_is_described_once(module: Any) -> None:
    """Memory of 2 GiB comes in 16 steps of 128 MiB; a layout is of all memory, so one is enough."""
    device = LocalDevice()
    extra = ["-m", "slots=2,maxmem=8G"]
    append = "memhp_default_state=online_movable"
    with attached(module, device, memory=512, machine="pc", extra=extra, append=append) as vm:
        wait_for(vm, "layouts_sent", 1)
        first = stats(vm)["layout_id"]
        share = {"qom-type": "memory-backend-memfd", "id": "m1", "size": 2 << 30, "share": True}
        vm.qmp("object-add", **share)
        vm.qmp("device_add", driver="pc-dimm", id="d1", memdev="m1")
        vm.guest.wait_for("test $(awk '/MemTotal/ {print $2}' /proc/meminfo) -gt 2400000")
        device.walk()
        assert 1 <= stats(vm)["layout_id"] - first <= 3


def test_huge_pages_that_give_structures_back_void_the_layout(module: Any) -> None:
    """``vm.hugetlb_optimize_vmemmap`` may be set at any time, and no module is notified."""
    if module[0] == "backports":
        pytest.skip("this kernel does not let a module see it")
    device = LocalDevice()
    with attached(module, device, memory=512) as vm:
        wait_for(vm, "layouts_sent", 1)
        assert device.walk()["complete"]
        layout = device.balloon.walk_queue.memmap.layout
        assert layout is not None
        vm.guest.sh("echo 1 >/proc/sys/vm/hugetlb_optimize_vmemmap")
        vm.guest.sh("echo 16 >/proc/sys/vm/nr_hugepages")
        assert device.walk()["complete"]
        begin = device.balloon.walk_queue.begin
        assert begin is not None
        assert begin.layout_id == 0
        vm.qmp("stop")
        transport = device.balloon.transport
        assert transport is not None
        with pytest.raises(VerificationRefused, match="witness"):
            device.ask(lambda: free_memory(layout, transport.memory))
        vm.qmp("cont")


def test_a_host_that_does_not_answer_holds_up_no_restart(module: Any) -> None:
    """A request is with the host, and the balloon's lock is held, when the kernel ends."""
    if module[0] != "backports":
        pytest.skip("before Linux 7.2 a virtio driver is not called at shutdown")
    device = LocalDevice()
    device.balloon._inflate.inflate = lambda *_, **__: None  # type: ignore[method-assign]
    with attached(module, device, memory=512, reboot=True) as vm:
        device.ask(lambda: device.balloon.set_target(256 << 20))
        wait_for(vm, "balloon_pages", 256)
        vm.guest.post("reboot -f")
        vm.wait_until_up()
        vm.guest.load("virtio_pci")
