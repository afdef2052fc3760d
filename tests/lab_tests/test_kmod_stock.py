# SPDX-License-Identifier: Apache-2.0
"""The guest module on QEMU's own balloon, without walk queue: nothing of the stock driver is lost.

And the walk itself, through the module's dry run, against what the kernel says of its free lists.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab import NAMES, Machine, build_module

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
MIB = 1 << 20
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
DEBUGFS = "/sys/kernel/debug/vballoon_walk"
BALLOON = "virtio-balloon-pci,id=b0"
TROUBLE = r"BUG|WARNING|Oops|Call Trace|Bad page|hung task|refcount"


@pytest.fixture(scope="module", params=NAMES)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kernel, and the module built for it."""
    out = tmp_path_factory.mktemp("kmod")
    return request.param, build_module(request.param, DRIVER, out).modules[0]


@contextmanager
def guest(module: tuple[str, Path], options: str = "", **hardware: Any) -> Iterator[Machine]:
    """Boot a guest whose balloon the module drives; check at the end that its log is clean."""
    extra = hardware.pop("extra", [])
    with Machine(
        kernel=module[0],
        files={"lab/vballoon_walk.ko": module[1]},
        extra=[*extra, "-device", BALLOON + options],
        **hardware,
    ) as vm:
        vm.guest.load("virtio_pci")
        vm.guest.sh("dmesg -c >/dev/null; insmod /lab/vballoon_walk.ko")
        assert driver(vm) == "vballoon_walk"
        yield vm
        assert not re.findall(TROUBLE, vm.guest.sh("dmesg")), vm.guest.sh("dmesg | tail -40")


def driver(vm: Machine) -> str:
    return vm.guest.sh("basename $(readlink /sys/bus/virtio/devices/virtio0/driver)").strip()


def numbers(text: str) -> dict[str, int]:
    return {k: int(v) for k, v in (line.split() for line in text.splitlines() if line)}


def stats(vm: Machine) -> dict[str, int]:
    return numbers(vm.guest.sh(f"cat {DEBUGFS}/virtio0/stats"))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.2)


def actual(vm: Machine) -> int:
    return int(vm.qmp("query-balloon")["actual"])


def resize(vm: Machine, mib: int) -> None:
    vm.qmp("balloon", value=mib * MIB)
    wait_until(lambda: actual(vm) == mib * MIB)


def test_inflates_and_deflates(module: Any) -> None:
    with guest(module, memory=512) as vm:
        total = vm.guest.meminfo()["MemTotal"]
        vm.guest.sh("memhog 200 </dev/null")
        full = vm.resident()
        resize(vm, 256)
        assert stats(vm)["balloon_pages"] == 256 * MIB // 4096
        # Without deflate-on-oom the guest does not count balloon pages as its own.
        assert vm.guest.meminfo()["MemTotal"] == total - 256 * MIB
        assert vm.resident() < full - 100 * MIB
        resize(vm, 512)
        assert stats(vm)["balloon_pages"] == 0
        assert vm.guest.meminfo()["MemTotal"] == total


def test_statistics_reach_the_host(module: Any) -> None:
    with guest(module, memory=512) as vm:
        path = "/machine/peripheral/b0"
        vm.qmp("qom-set", path=path, property="guest-stats-polling-interval", value=1)

        def seen() -> dict[str, int]:
            answer = vm.qmp("qom-get", path=path, property="guest-stats")
            found: dict[str, int] = answer["stats"] if answer["last-update"] else {}
            return found

        wait_until(lambda: bool(seen()))
        guest_total = vm.guest.meminfo()["MemTotal"]
        assert seen()["stat-total-memory"] == guest_total
        before = seen()["stat-free-memory"]
        vm.guest.start("memhog 100", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        wait_until(lambda: seen()["stat-free-memory"] < before - 70 * MIB)
        assert 0 < seen()["stat-available-memory"] < guest_total
        assert seen()["stat-minor-faults"] > 1000


def test_reporting_frees_host_memory(module: Any) -> None:
    with guest(module, ",free-page-reporting=on", memory=512) as vm:
        assert stats(vm)["reporting"] == 1
        vm.guest.report_everything()
        vm.guest.start("memhog 300", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        full = vm.resident()
        vm.guest.sh("echo check >/run/hog; sleep 1; grep -q good /run/hog.log; echo free >/run/hog")
        wait_until(lambda: vm.resident() < full - 285 * MIB)


def test_hinting_spares_a_migration_free_memory(module: Any) -> None:
    options = ",free-page-hint=on,iothread=io0"
    with guest(module, options, extra=["-object", "iothread,id=io0"], memory=1024) as vm:
        vm.guest.sh("memhog 600 </dev/null")
        vm.guest.sh("keeper make /tmp 40")
        # Hints race with the copying; on a busy host the guest needs the time.
        vm.qmp("migrate-set-parameters", **{"max-bandwidth": 16 * MIB})
        vm.qmp("migrate", uri=f"exec:cat >{vm.folder}/state")
        wait_until(lambda: vm.qmp("query-migrate").get("status") == "completed", 120)
        moved = vm.qmp("query-migrate")["ram"]["transferred"]
        assert 40 * MIB < moved < 400 * MIB
        vm.qmp("cont")
        assert "bad" not in vm.guest.sh("keeper check /tmp")
        wait_until(lambda: stats(vm)["hinted_blocks"] == 0)


def test_deflates_before_the_guest_runs_out_of_memory(module: Any) -> None:
    with guest(module, ",deflate-on-oom=on", memory=512) as vm:
        resize(vm, 200)
        small = actual(vm)
        vm.guest.sh("memhog 200 </dev/null")
        assert actual(vm) > small
        assert "Killed process" not in vm.guest.sh("dmesg")


def test_poison_is_negotiated_where_pages_are_cleared(module: Any) -> None:
    """Feature 4 only with init_on_free here, and then reporting needs it."""
    for append, poison in (("", "0"), ("init_on_free=1", "1")):
        with guest(module, ",free-page-reporting=on", memory=256, append=append) as vm:
            features = vm.guest.sh("cat /sys/bus/virtio/devices/virtio0/features").strip()
            # QEMU offers PAGE_POISON; the module takes it only where it means something.
            assert features[4] == poison
            assert features[5] == "1"
            assert features[63] == "0"
            assert stats(vm)["walk_queue"] == 0


def test_loads_unloads_and_changes_places_with_the_stock_driver(module: Any) -> None:
    unbind = "echo virtio0 >/sys/bus/virtio/drivers/{}/unbind"
    bind = "echo virtio0 >/sys/bus/virtio/drivers/{}/bind"
    with guest(module, ",free-page-reporting=on,deflate-on-oom=on", memory=512) as vm:
        vm.guest.load("virtio_balloon")
        for _ in range(5):
            vm.guest.sh(unbind.format("vballoon_walk") + ";" + bind.format("virtio_balloon"))
            assert driver(vm) == "virtio_balloon"
            vm.guest.sh(unbind.format("virtio_balloon") + ";" + bind.format("vballoon_walk"))
            assert driver(vm) == "vballoon_walk"
        vm.guest.sh("rmmod virtio_balloon")
        free = vm.guest.meminfo()["MemFree"]
        vm.qmp("balloon", value=400 * MIB)
        loop = "for i in $(seq 15); do rmmod vballoon_walk && insmod /lab/vballoon_walk.ko; done"
        vm.guest.sh(loop, timeout=120)
        # The balloon was full or being filled at each unload: all of it came back.
        resize(vm, 512)
        vm.guest.sh("rmmod vballoon_walk")
        wait_until(lambda: vm.guest.meminfo()["MemFree"] > free - 8 * MIB)


def test_survives_suspend_to_ram(module: Any) -> None:
    """All is given back before, and taken again after."""
    with guest(module, ",free-page-reporting=on", memory=512, machine="pc") as vm:
        resize(vm, 300)
        vm.guest.start("sh -c 'sleep 1; echo mem >/sys/power/state; echo awake'", log="/run/s.log")
        vm.monitor.wait_event("SUSPEND", timeout=30)
        vm.qmp("system_wakeup")
        vm.monitor.wait_event("WAKEUP", timeout=30)
        time.sleep(3)  # the agent's line is not one yet
        vm.guest.wait_for("grep -q awake /run/s.log")
        wait_until(lambda: stats(vm)["balloon_pages"] == 212 * MIB // 4096)
        resize(vm, 512)
        assert stats(vm)["reporting"] == 1


WALK = r"""
snap() {{ S=; while read -r line; do S="$S$line|"; done </proc/buddyinfo; }}
for i in $(seq 300); do
    snap; B=$S; echo {order} >{debugfs}/dry_run; snap
    if [ "$B" = "$S" ]; then echo "$B"; cat {debugfs}/dry_run; exit 0; fi
done
exit 1
"""


def buddy_pages(text: str, order: int) -> int:
    rows = [[int(n) for n in row.split("zone")[1].split()[1:]] for row in text.split("|") if row]
    return sum(n << i for row in rows for i, n in enumerate(row) if i >= order)


def quiet_walk(vm: Machine, order: int) -> dict[str, int]:
    """Return a dry run during which the free lists did not change, so /proc/buddyinfo is exact.

    The script forks nothing between its two looks.
    """
    counted, walk = vm.guest.sh(WALK.format(order=order, debugfs=DEBUGFS)).split("\n", 1)
    found = numbers(walk)
    assert found["block_pages"] == buddy_pages(counted, order)
    assert found["result"] == 0
    return found


def test_dry_run_sees_what_buddyinfo_counts(module: Any) -> None:
    """Whole lists and lists read in many slices, big blocks and a fragmented guest."""
    with guest(module, memory=512, smp=2, nodes=2) as vm:
        for order in (10, 4, 0):
            assert quiet_walk(vm, order)["blocks"] > 0
        vm.guest.start("memhog 300", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        vm.guest.sh("echo fragment >/run/hog")
        vm.guest.wait_for("tail -1 /run/hog.log | grep -q fragment")
        whole = quiet_walk(vm, 0)
        assert whole["blocks"] > 20_000
        vm.guest.sh("echo 1 >/sys/module/vballoon_walk/parameters/slice_us")
        sliced = quiet_walk(vm, 0)
        assert sliced["slices"] > whole["slices"] + 200
        vm.guest.sh("echo 1000000 >/sys/module/vballoon_walk/parameters/slice_us")
        unbound = quiet_walk(vm, 0)
        assert unbound["slices"] < whole["slices"]
        print(f"\n{module[0]}: holds {unbound['longest_hold_ns']} ns unbounded,", end=" ")
        print(f"{whole['longest_hold_ns']} at 50 us, {sliced['longest_hold_ns']} at 1 us")


def test_dry_run_refuses_an_order_that_is_none(module: Any) -> None:
    with guest(module, memory=256) as vm:
        for word in ("11", "-1", "many", "99999999999999999999"):
            assert vm.guest.run(f"echo {word} >{DEBUGFS}/dry_run").status != 0
