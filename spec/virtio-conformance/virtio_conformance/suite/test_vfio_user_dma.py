# SPDX-License-Identifier: Apache-2.0
"""Client memory over vfio-user: mapped, unmapped, reached by messages, described wrongly."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from virtio_conformance.findings import Closed, not_applicable, require
from virtio_conformance.memory import PAGE, GuestRam
from virtio_conformance.observe import Process
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.vfio_user import Client
from virtio_formats.vfio_user import Command, DmaMap, DmaUnmap, PciRegion

NAME = "conformance-ram"
MakeRig = Callable[..., VfioUserRig]


@pytest.fixture
def session(client: Client) -> Client:
    """Return a client that has negotiated."""
    client.negotiate()
    return client


@pytest.fixture
def ram() -> Any:
    """Return guest memory."""
    made = GuestRam()
    yield made
    made.close()


def held(target: Any) -> int:
    """Return how many descriptors and mappings of our memory the server has."""
    process: Process = target.process
    return sum(NAME in n for n in process.fds()) + process.mappings(NAME)


def map_request(flags: int = 3, offset: int = 0, address: int = 0, size: int = PAGE) -> bytes:
    """Return a DMA_MAP payload with any values."""
    return DmaMap(argsz=32, flags=flags, offset=offset, address=address, size=size).build()


@pytest.mark.requirement("vf.dma.map-exists")
def test_mapping_over_a_mapping(session: Client, ram: GuestRam) -> None:
    """Mapping over an existing region, wholly or in part, fails with EEXIST."""
    region = ram.regions[1]
    require(not session.map(region).failed, "DMA_MAP failed")
    for address, size in ((region.guest, region.size), (region.guest + PAGE, PAGE)):
        payload = map_request(3, region.offset, address, size)
        answer = session.ask(Command.DMA_MAP, payload, [region.fd])
        require(answer.failed, f"mapping {address:#x} twice succeeds")
        require(answer.error == errno.EEXIST, f"errno {answer.error}, due is EEXIST")


@pytest.mark.requirement("vf.dma.map-mode-no-fd")
@pytest.mark.parametrize("mode", [1 << 2, 1 << 3], ids=["mmap", "file-io"])
def test_access_mode_without_descriptor(session: Client, mode: int) -> None:
    """An access mode that needs a descriptor, without one, fails with EINVAL."""
    answer = session.ask(Command.DMA_MAP, map_request(3 | mode))
    require(answer.failed, "a region that cannot be reached is accepted")
    require(answer.error == errno.EINVAL, f"errno {answer.error}, due is EINVAL")


@pytest.mark.requirement("vf.dma.map-default", "vf.dma.unmap-releases", "vf.dma.unmap-exact")
def test_map_and_unmap(session: Client, ram: GuestRam, target: Any) -> None:
    """A mapped region is held; unmapped, nothing of it is; the reply echoes the request."""
    before = held(target)
    for region in ram.regions:
        require(not session.map(region).failed, "DMA_MAP failed")
    told = "regions with a descriptor are neither mapped nor open"
    require(held(target) > before, told, row="vf.dma.map-default")
    region = ram.regions[1]
    for address, size in (
        (region.guest, PAGE),
        (region.guest + PAGE, region.size - PAGE),
        (region.guest, region.size * 2),
    ):
        payload = DmaUnmap(argsz=24, flags=0, address=address, size=size).build()
        told = "a part can be unmapped"
        require(session.ask(Command.DMA_UNMAP, payload).failed, told, row="vf.dma.unmap-exact")
    for region in ram.regions:
        answer = session.unmap(region)
        require(not answer.failed, f"DMA_UNMAP failed with errno {answer.error}")
        due = DmaUnmap(argsz=24, flags=0, address=region.guest, size=region.size).build()
        told = f"the reply says {answer.payload.hex()}"
        require(answer.payload[8:] == due[8:], told, row="vf.dma.unmap-exact")
    told = "something of the memory is held after DMA_UNMAP"
    require(held(target) <= before, told, row="vf.dma.unmap-releases")
    require(not session.map(ram.regions[0]).failed, "mapping again failed")


@pytest.mark.requirement("vf.robust.dma")
@pytest.mark.parametrize(
    ("offset", "address", "size"),
    [(0, 0, 0), (0, (1 << 64) - PAGE, 2 * PAGE), (0, 0, 1 << 63), (1 << 63, 0, PAGE),
     ((1 << 64) - PAGE, 0, 2 * PAGE), (123, 0, PAGE), (0, 123, PAGE), (0, 0, 123),
     (1 << 40, 0, PAGE), (0, 0, 1 << 34)],
)  # fmt: skip
def test_maps_that_make_no_sense(
    session: Client, ram: GuestRam, offset: int, address: int, size: int
) -> None:
    """Maps that are empty, wrap, or lie beyond their file."""
    try:
        session.ask(Command.DMA_MAP, map_request(3, offset, address, size), [ram.regions[1].fd])
        session.usable()
    except Closed:
        pass


@pytest.mark.requirement("vf.robust.dma")
def test_map_of_a_pipe(session: Client) -> None:
    """A descriptor that cannot be mapped is refused and closed."""
    reader, writer = os.pipe()
    try:
        answer = session.ask(Command.DMA_MAP, map_request(), [reader])
        require(answer.failed, "a pipe is taken for memory")
    except Closed:
        pass
    os.close(reader)
    os.close(writer)


@pytest.mark.requirement("vf.disconnect.cleanup")
def test_memory_is_let_go_of_when_the_client_leaves(
    new_client: Callable[[], Client], target: Any, ram: GuestRam
) -> None:
    """A client's memory does not outlive its connection."""
    first = new_client()
    first.negotiate()
    before = held(target)
    for region in ram.regions:
        first.map(region)
    first.close()
    second = new_client()
    second.negotiate()
    require(held(target) <= before, "memory of a client that left is still held")
    require(not second.map(ram.regions[0]).failed, "the next client cannot map")


@pytest.mark.requirement("vf.disconnect.state-kept")
def test_device_state_outlives_the_client(new_client: Callable[[], Client]) -> None:
    """What a client has written into the device is there for the next one."""
    first = new_client()
    first.negotiate()
    line = 0x3C
    value = first.read(PciRegion.CONFIG, line, 1)[0] ^ 0x69
    first.write(PciRegion.CONFIG, line, bytes([value]))
    first.close()
    second = new_client()
    second.negotiate()
    require(second.read(PciRegion.CONFIG, line, 1)[0] == value, "the device was reset")


# -- memory by messages ----------------------------------------------------------------------


def by_messages(new_rig: MakeRig, packed: bool) -> VfioUserRig:
    """Return a running device whose memory has no descriptor."""
    rig = new_rig(packed)
    rig.with_fds = False
    return rig


@pytest.mark.requirement(
    "vf.dma.message",
    "vf.access.supported",
    "vf.dma.message-exported",
    "vf.dma.write-exported",
    "vf.access.limit",
    "vf.dma.map-default",
)
def test_memory_without_descriptor(new_rig: MakeRig, packed: bool) -> None:
    """Rings and buffers in memory without a descriptor are reached by DMA messages."""
    rig = by_messages(new_rig, packed)
    rig.bring_up(size=16)
    for serial in range(4):
        rig.run([rig.request(serial)])
    seen = rig.client.dma_messages
    require(seen, "no DMA message, yet buffers came back")
    for _, address, count in seen:
        inside = any(r.guest <= address and address + count <= r.end for r in rig.ram.regions)
        told = f"DMA message of {count} bytes at {address:#x}"
        require(inside or count == 0, told, row="vf.dma.message-exported")
        require(count <= 1 << 20, f"DMA message of {count} bytes", row="vf.access.limit")


@pytest.mark.requirement("vf.access.limit")
def test_small_transfer_limit(new_client: Callable[[], Client], new_rig: MakeRig) -> None:
    """No DMA message exceeds the limit that the client has named."""
    from virtio_conformance import vfio_user

    default = dict(vfio_user.DEFAULT_CAPABILITIES)
    vfio_user.DEFAULT_CAPABILITIES["max_data_xfer_size"] = 64
    try:
        rig = by_messages(new_rig, False)
        rig.bring_up(size=64)
        for serial in range(3):
            rig.run([rig.request(serial)])
    finally:
        vfio_user.DEFAULT_CAPABILITIES.update(default)
    largest = max(count for _, _, count in rig.client.dma_messages)
    require(largest <= 64, f"DMA message of {largest} bytes, the limit is 64")


@pytest.mark.requirement("vf.dma.read-short", "vf.dma.write-short")
@pytest.mark.parametrize("how", ["short", "refused"])
def test_dma_that_fails(new_rig: MakeRig, how: str) -> None:
    """Short replies and errors to DMA messages do no harm."""
    rig = by_messages(new_rig, False)
    rig.bring_up(size=16)
    rig.warm_up()
    rig.client.short_dma = 1 if how == "short" else 0
    rig.client.refuse_dma = how == "refused"
    rig.submit(rig.request(1))
    rig.main.publish()
    try:
        rig.kick(rig.profile.main)
        rig.client.serve_for(0.15)
    except Closed:
        pass
    rig.survive(spinning=True)


@pytest.mark.requirement("vf.dma.unmap-releases")
def test_ring_unmapped_while_running(new_rig: MakeRig, packed: bool) -> None:
    """After DMA_UNMAP nothing in that memory is touched, though the ring is still enabled."""
    rig = new_rig(packed)
    rig.bring_up(size=16)
    rig.warm_up()
    for region in rig.ram.regions:
        require(not rig.client.unmap(region).failed, "DMA_UNMAP failed")
    rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    rig.client.ram = None
    try:
        rig.kick(rig.profile.main)
        rig.main_quiet(0.1)
    except Closed:
        pass
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, rig.main.publish_span)


@pytest.mark.requirement("vf.dma.map")
def test_memory_mapped_anew(new_rig: MakeRig) -> None:
    """Regions unmapped and mapped again (as for a guest's reboot) serve a device reset between."""
    rig = new_rig(False)
    rig.bring_up(size=16)
    rig.warm_up()
    for region in rig.ram.regions:
        rig.client.unmap(region)
    rig.pci.reset()
    rig.map_all()  # before a driver runs, as QEMU does
    rig.rings.clear()
    rig.bring_up(size=32)
    for serial in range(4):
        rig.run([rig.request(serial)])
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
