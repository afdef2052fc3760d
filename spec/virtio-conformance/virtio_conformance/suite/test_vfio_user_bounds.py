# SPDX-License-Identifier: Apache-2.0
"""Ends and counts over vfio-user: reports of a range, the end of a stream, writes that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import Closed, not_applicable, preparing, require
from virtio_conformance.memory import PAGE
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.suite.test_vfio_user_feature import go, need, report, start_log
from virtio_conformance.vfio_user import Client
from virtio_formats.vfio_user import (
    Command,
    DeviceState,
    DmaMap,
    DmaMapFlags,
    Feature,
    FeatureFlags,
    HeaderFlags,
    MigData,
    PciRegion,
    RegionAccess,
    WriteMulti,
    WriteOne,
)

MakeRig = Callable[..., VfioUserRig]
LINE = 0x3C
"""Interrupt Line of configuration space: plain storage."""


@pytest.fixture
def session(client: Client) -> Client:
    """Return a client that has negotiated."""
    client.negotiate()
    return client


@pytest.mark.requirement("vf.log.range")
def test_report_of_one_range_leaves_the_others(new_rig: MakeRig) -> None:
    """Pages outside the reported range are still there for a later report."""
    rig = new_rig(False)
    need(rig.client, Feature.DMA_LOGGING_START, FeatureFlags.SET)
    rig.bring_up(size=16)
    spans = [(region.guest, region.size) for region in rig.ram.regions]
    require(not start_log(rig, spans).failed, "DMA_LOGGING_START failed")
    rig.run([rig.request(0)])
    used = rig.main.device_span[0][0] // PAGE * PAGE
    for start, length in ((used - PAGE, PAGE), (used + PAGE, 4 * PAGE), (0x4000_0000, 1 << 20)):
        require(used not in report(rig, start, length), "a page outside the range is reported")
    require(used in report(rig, used, PAGE), "the page is lost after reports of other ranges")


@pytest.mark.requirement("vf.migration.end")
def test_reads_after_the_end_of_the_stream(new_rig: MakeRig) -> None:
    """Reads after the end of the stream return nothing."""
    rig = new_rig(False)
    need(rig.client, Feature.MIG_DEVICE_STATE, FeatureFlags.SET)
    rig.bring_up(size=16)
    rig.warm_up()
    with preparing():
        require(not go(rig.client, DeviceState.STOP_COPY).failed, "STOP_COPY failed")
    total, size = 0, 100
    while size == 100:
        answer = rig.client.do(Command.MIG_DATA_READ, MigData(argsz=108, size=100).build())
        size = MigData.parse(answer.payload[:8]).size
        total += size
        require(total < 1 << 24, "the stream does not end")
    for _ in range(3):
        answer = rig.client.do(Command.MIG_DATA_READ, MigData(argsz=108, size=100).build())
        more = MigData.parse(answer.payload[:8]).size
        require(more == 0, f"{more} bytes more after the end of {total}")


def writes(client: Client, count: int, *places: tuple[int, int, int]) -> bytes:
    """Return a REGION_WRITE_MULTI payload that announces *count* (region, offset, value)."""
    if not client.capabilities.get("write_multiple"):
        not_applicable("write_multiple is not offered")
    return WriteMulti(wr_cnt=count).build() + b"".join(
        WriteOne(offset=offset, region=region, count=1, data=bytes([value]) + bytes(7)).build()
        for region, offset, value in places
    )


@pytest.fixture
def multiple(client: Client) -> Client:
    """Return a client that has negotiated several writes in one message."""
    client.negotiate({"max_msg_fds": 8, "write_multiple": True})
    return client


@pytest.mark.requirement("vf.write-multi")
def test_count_of_writes_up_to_a_failing_one(multiple: Client) -> None:
    """When a write fails the reply counts those that were done before it, or is an error."""
    config = PciRegion.CONFIG
    payload = writes(multiple, 3, (config, LINE, 0x11), (config, 1 << 20, 1), (config, LINE, 0x22))
    answer = multiple.ask(Command.REGION_WRITE_MULTI, payload)
    value = multiple.read(config, LINE, 1)[0]
    if answer.failed:
        return
    done = WriteMulti.parse(answer.payload).wr_cnt
    require(done < 3, f"{done} writes are counted, one of them to no place at all")
    due = 0x22 if done == 2 else 0x11
    require(done == 0 or value == due, f"{done} writes are counted, and {value:#x} is there")


@pytest.mark.requirement("vf.robust.count")
@pytest.mark.parametrize("count", [0, 2, 5, 1 << 40, (1 << 64) - 1], ids=hex)
def test_count_of_writes_that_does_not_fit(multiple: Client, count: int) -> None:
    """A count other than that of the writes in the message is refused or harmless."""
    payload = writes(multiple, count, (PciRegion.CONFIG, LINE, 0x33))
    try:
        answer = multiple.ask(Command.REGION_WRITE_MULTI, payload)
    except Closed:
        return
    if not answer.failed:
        done = WriteMulti.parse(answer.payload).wr_cnt
        require(done <= 1, f"{done} writes are counted, the message has one")
    require(multiple.usable(), "the connection ended")


@pytest.mark.requirement("vf.no-reply")
def test_no_reply_for_a_command_that_fails(session: Client) -> None:
    """A command with No_reply that fails stays without a reply, and the next is answered."""
    bad = RegionAccess(offset=1 << 40, region=PciRegion.CONFIG, count=4).build()
    try:
        session.send(Command.REGION_READ, bad, flags=HeaderFlags.NO_REPLY, message_id=0x1111)
        wanted = session.send(Command.DEVICE_GET_INFO, INFO, message_id=0x2222)
        answer = session.receive()
    except Closed:
        return
    require(answer.id == wanted, f"a reply to message {answer.id:#x}, which wanted none")


INFO = bytes([16]) + bytes(15)


@pytest.mark.requirement("vf.version.minor")
@pytest.mark.parametrize("minor", [0, 1, 2, 0xFFFF])
def test_minor_version_is_not_above_the_proposed(client: Client, minor: int) -> None:
    """Whatever minor version is proposed, the reply has it or a lower one."""
    answer = client.negotiate({}, minor)
    got = int.from_bytes(answer.payload[2:4], "little")
    require(got <= minor, f"minor version {got}, proposed was {minor}")


@pytest.mark.requirement("vf.dma.writeable")
def test_region_that_is_not_writeable(new_rig: MakeRig) -> None:
    """A buffer in a region that is mapped for reading alone is not written or freed."""
    rig = new_rig(False)
    rig.bring_up(size=16)
    rig.warm_up()
    region = rig.ram.regions[3]
    with preparing():
        require(not rig.client.unmap(region).failed, "DMA_UNMAP failed")
    message = DmaMap(
        argsz=32,
        flags=DmaMapFlags.READABLE,
        offset=region.offset,
        address=region.guest,
        size=region.size,
    )
    if rig.client.ask(Command.DMA_MAP, message.build(), [region.fd]).failed:
        not_applicable("a region that is not writeable is refused")
    exchange = rig.profile.exchange(rig, 0)
    if rig.profile.name == "balloon":
        page = region.guest + 4 * PAGE
        exchange = Exchange((page // PAGE).to_bytes(4, "little"))
        placed = rig.place(exchange, region=1)
    else:
        placed = rig.place(exchange, region=3)
    rig.submit(placed)
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(0.15)
    rig.survive(spinning=True)
    spans = [(low, high) for low, high in rig.allowed() if low < region.guest]
    rig.ram.expect_untouched(before, spans)
