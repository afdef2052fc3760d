# SPDX-License-Identifier: Apache-2.0
"""The main job, on stock QEMU and stock Linux: attach, reclaim, hint, balloon, export.

One guest a machine type, kernel and transport; the steps run in order from boot to the end, so
that each step starts from the state that the previous one left.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tests.lab import NAMES, Machine
from tests.lab.backend import TRANSPORTS, Backend, negotiated, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MIB = 1 << 20
MEMORY = 1024
FREED = 300


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_story(transport: str, kernel: str, machine: str, tmp_path: Path) -> None:
    with (
        Backend(transport) as backend,
        Machine(kernel=kernel, machine=machine, memory=MEMORY, extra=backend.device(machine)) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 48")
        vm.guest.load("virtio_balloon")
        vm.guest.report_everything()
        wait_until(lambda: "VIRTIO_BALLOON_F_FREE_PAGE_HINT" in negotiated(backend))
        reporting_gives_back(vm, backend)
        inflate_and_deflate(vm, backend)
        hinting_covers_free_memory(vm, backend)
        statistics_arrive(vm, backend)
        bitmap_is_exported(backend, tmp_path / "export")
        assert vm.guest.sh("keeper check /tmp/kept").startswith("good")
        assert "queue" not in backend.words(), backend.words()


def reporting_gives_back(vm: Machine, backend: Backend) -> None:
    """At least 95 % of what the guest frees comes back to the host."""
    vm.guest.start(f"memhog {FREED}", log="/run/hog.log", fifo="/run/hog")
    vm.guest.wait_for("grep -q filled /run/hog.log")
    full = vm.resident()
    vm.guest.sh("echo free >/run/hog")
    wait_until(lambda: full - vm.resident() >= 0.95 * FREED * MIB)
    assert backend.ctl("query-skip-bitmap")["pages"]["reported"] * 4096 >= 0.95 * FREED * MIB


def inflate_and_deflate(vm: Machine, backend: Backend) -> None:
    """To half the guest and back, each within 1 % of the target."""
    size = backend.ctl("query-balloon")["actual"]
    assert abs(size - MEMORY * MIB) <= MIB
    for target in (size // 2, size):
        backend.ctl("balloon", value=target)
        wait_until(
            lambda t=target: abs(backend.ctl("query-balloon")["actual"] - t) <= size // 100,
            timeout=60,
        )
        ballooned = backend.ctl("query-skip-bitmap")["pages"]["ballooned"] * 4096
        assert abs(ballooned - (size - target)) <= size // 100
    assert vm.resident() < size


def hinting_covers_free_memory(vm: Machine, backend: Backend) -> None:
    """Check that a hinting round covers at least 90 % of the guest's free memory."""
    free = vm.guest.meminfo()["MemFree"]
    round_id = backend.ctl("start-hinting")["round"]
    done = backend.events.wait_event("ROUND_COMPLETED", timeout=60)["data"]
    assert (done["round"], done["complete"]) == (round_id, True)
    hinted = backend.ctl("query-skip-bitmap")["pages"]["hinted"] * 4096
    assert 0.9 * free <= hinted <= 1.05 * free
    wait_until(lambda: vm.guest.meminfo()["MemFree"] >= 0.9 * free, timeout=20)


def statistics_arrive(vm: Machine, backend: Backend) -> None:
    """Check that polling brings new statistics that agree with the guest."""
    backend.ctl("set-guest-stats-interval", seconds=1)
    first = backend.ctl("query-guest-stats")["last-update"]
    wait_until(lambda: backend.ctl("query-guest-stats")["last-update"] > first, timeout=20)
    memory = vm.guest.meminfo()["MemTotal"]
    assert backend.ctl("query-guest-stats")["stats"]["stat-total-memory"] == memory

    def distance() -> int:  # pages on their way to a report are not free for a moment
        stats = backend.ctl("query-guest-stats")["stats"]
        return abs(stats["stat-free-memory"] - vm.guest.meminfo()["MemFree"])

    wait_until(lambda: distance() <= 16 * MIB, timeout=20)
    backend.ctl("set-guest-stats-interval", seconds=0)


def bitmap_is_exported(backend: Backend, folder: Path) -> None:
    """Check that the exported counts equal the live ones, once the guest reports nothing new."""
    exports = (folder.with_name(f"{folder.name}-{turn}") for turn in itertools.count())

    def equal() -> bool:
        place = next(exports)
        backend.export(place)
        manifest = json.loads((place / "manifest.json").read_text())
        return bool(manifest["pages"] == backend.ctl("query-skip-bitmap")["pages"])

    wait_until(equal, step=1)


FEATURES = {
    "stats-vq": "STATS_VQ",
    "free-page-hint": "FREE_PAGE_HINT",
    "page-reporting": "PAGE_REPORTING",
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_queue_numbers_of_all_feature_combinations(transport: str) -> None:
    """Stats, hinting and reporting on or off: every queue that is left does its job."""
    options = ["--no-msix"] if transport == "vfio-user" else []  # it is to be unplugged
    with Machine(kernel="6.12", machine="q35", memory=384) as vm:
        vm.guest.load("virtio_balloon")
        for mask in range(8):
            names = [name for i, name in enumerate(FEATURES) if mask >> i & 1]
            offered = ",".join(["MUST_TELL_HOST", *(FEATURES[n] for n in names)])
            with Backend(transport, *options, "--features", offered, config_size=16) as backend:
                backend.plug(vm)
                wait_until(lambda b=backend, n=names: len(running(b)) == 2 + len(n))
                assert "VIRTIO_BALLOON_F_MUST_TELL_HOST" in negotiated(backend)
                each_queue_works(vm, backend, names)
                backend.unplug(vm)


def running(backend: Backend) -> set[int]:
    """Return the queues that the driver has started."""
    queues = backend.ctl("query-status")["queues"]
    return {q["index"] for q in queues if q["state"] == "running"}


def each_queue_works(vm: Machine, backend: Backend, names: list[str]) -> None:
    """Use what was offered, and inflate."""
    if "page-reporting" in names:
        vm.guest.report_everything()
        wait_until(lambda: backend.ctl("query-skip-bitmap")["pages"]["reported"] > 0)
    if "stats-vq" in names:
        backend.ctl("set-guest-stats-interval", seconds=1)
        wait_until(lambda: backend.ctl("query-guest-stats")["last-update"] > 0)
    if "free-page-hint" in names:
        backend.ctl("start-hinting")
        assert backend.events.wait_event("ROUND_COMPLETED")["data"]["complete"]
    size = backend.ctl("query-balloon")["actual"]
    # The guest may still own what it has hinted, and its statistics then say that it has nothing.
    backend.ctl("balloon", value=size - 64 * MIB, force=True)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] <= size - 64 * MIB)
    assert running(backend) == set(range(2 + len(names)))  # Linux leaves no gaps
    assert "stopped" not in backend.words()
