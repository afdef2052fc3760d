# SPDX-License-Identifier: Apache-2.0
"""``walk_free_mem_block()`` as another module sees it, and how long it holds a zone's lock.

The contract is that of the function's kernel-doc: the largest order first in each zone, under the
zone's lock with interrupts off, free blocks only, and what the callback returns ends the walk.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import NAMES, Machine, build_module

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
HERE = Path(__file__).resolve().parent
DRIVER = HERE.parents[1] / "driver_kmod"
DEBUGFS = "/sys/kernel/debug/vballoon_walk"
MIB = 1 << 20


@pytest.fixture(scope="module", params=NAMES)
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """Boot a guest of two nodes with the module and a caller of it, both built together."""
    out = tmp_path_factory.mktemp("kmod")
    source = shutil.copytree(DRIVER, out / "source")
    shutil.copy(HERE / "kmod_caller" / "walk_caller.c", source)
    with (source / "Kbuild").open("a") as kbuild:
        kbuild.write("obj-m += walk_caller.o\n")
    modules = build_module(request.param, source, out).modules
    files: dict[str, bytes | Path] = {f"lab/{module.name}": module for module in modules}
    with Machine(kernel=request.param, memory=1024, smp=2, nodes=2, files=files) as vm:
        vm.guest.load("virtio_pci")
        vm.guest.sh("dmesg -c >/dev/null; insmod /lab/vballoon_walk.ko")
        yield vm
        assert not re.findall(r"BUG|WARNING|Oops|Call Trace|scheduling while", vm.guest.sh("dmesg"))


def call(vm: Machine, **parameters: int) -> dict[str, int]:
    """Return the values in the caller's log line."""
    words = " ".join(f"{name}={value}" for name, value in parameters.items())
    vm.guest.sh(f"insmod /lab/walk_caller.ko {words}; rmmod walk_caller")
    line = vm.guest.sh("dmesg | grep walk_caller: | tail -1")
    return {name: int(value) for name, value in re.findall(r"(\w+)=(-?\d+)", line)}


@pytest.mark.parametrize("min_order", [-5, 0, 3, 10, 11])
def test_reports_free_blocks_largest_first_under_the_lock(guest: Machine, min_order: int) -> None:
    free = guest.guest.meminfo()["MemFree"] // 4096
    seen = call(guest, min_order=min_order)
    assert (seen["ret"], seen["rises"], seen["unlocked"], seen["used"]) == (0, 0, 0, 0)
    if min_order > 10:
        assert seen["blocks"] == 0
        return
    assert seen["least"] == 1 << max(min_order, 0)
    assert seen["zones"] >= 2
    # Only a list whose reading ran out of time is begun anew.
    assert seen["again"] < seen["blocks"] / 2
    assert 0.7 * free < seen["pages"] < 1.01 * free


@pytest.mark.parametrize("value", [7, -12])
def test_what_the_callback_returns_ends_the_walk_and_is_returned(
    guest: Machine, value: int
) -> None:
    for after in (1, 2, 100):
        seen = call(guest, stop_after=after, stop_with=value)
        assert (seen["ret"], seen["blocks"]) == (value, after)


def dry_run(vm: Machine) -> dict[str, int]:
    text = vm.guest.sh(f"echo 0 >{DEBUGFS}/dry_run; cat {DEBUGFS}/dry_run")
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def test_lock_holds_beside_stretches_in_which_nothing_is_done(guest: Machine) -> None:
    """Where a virtual CPU loses its host CPU, both are long; the walk's own share is the rest."""
    guest.guest.start("memhog 600", log="/run/hog.log", fifo="/run/hog")
    guest.guest.wait_for("grep -q filled /run/hog.log")
    guest.guest.sh("echo fragment >/run/hog")
    guest.guest.wait_for("tail -1 /run/hog.log | grep -q fragment")
    walks = [dry_run(guest) for _ in range(10)]
    slices = sum(walk["slices"] for walk in walks)
    idle = call(guest, holds=slices)
    longest = sorted(walk["longest_hold_ns"] // 1000 for walk in walks)
    overlong = sum(walk["overlong"] for walk in walks)
    print(
        f"\n{guest.config.kernel}: {slices} slices of 50 us over {walks[0]['blocks']} blocks: "
        f"{overlong} above 100 us, longest of each walk {longest} us; "
        f"doing nothing instead: {idle['overlong']} above 100 us, longest "
        f"{idle['longest_hold_ns'] // 1000} us"
    )
    assert min(walk["blocks"] for walk in walks) > 50_000
    # No slice is longer by the number of blocks in it, so the usual one keeps to its bound.
    assert overlong < slices / 20
    assert longest[0] < 1000
