# SPDX-License-Identifier: Apache-2.0
"""The vfio-user protocol itself, on any PCI device: versions, information, regions, interrupts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from virtio_conformance.findings import Closed, Hang, not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.vfio_user import Client, close_all
from virtio_formats.vfio_user import (
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    Command,
    DeviceFlags,
    DeviceInfo,
    Header,
    HeaderFlags,
    IrqInfo,
    IrqSet,
    IrqSetFlags,
    PciRegion,
    RegionAccess,
    RegionFlags,
    RegionInfo,
    RegionIoFds,
    Version,
    WriteMulti,
    WriteOne,
)

CONFIG = PciRegion.CONFIG
INFO = DeviceInfo(argsz=16, flags=0, num_regions=0, num_irqs=0).build()


@pytest.fixture
def session(client: Client) -> Client:
    """Return a client that has negotiated."""
    client.negotiate()
    return client


@pytest.mark.requirement(
    "vf.version.major", "vf.version.minor", "vf.version.subset", "vf.header.reply"
)
@pytest.mark.parametrize("minor", [0, 1, 7])
def test_version(client: Client, minor: int) -> None:
    """The version answered is the one proposed or an older minor one, with a subset of the
    capabilities."""
    offered = {"max_msg_fds": 8, "max_data_xfer_size": 65536, "max_dma_maps": 10}
    answer = client.negotiate(offered, minor)
    version = Version.parse(answer.payload[: Version.SIZE])
    require(version.major == 0, f"major version {version.major}")
    told = f"minor version {version.minor}, proposed was {minor}"
    require(version.minor <= minor, told, row="vf.version.minor")
    require(answer.payload[Version.SIZE :][-1:] in (b"", b"\0"), "version data without its NUL")
    surplus = {"twin_socket"} & set(client.capabilities)
    told = f"capabilities that were not proposed: {surplus}"
    require(not surplus, told, row="vf.version.subset")


@pytest.mark.requirement("vf.version.older")
def test_version_without_data(client: Client) -> None:
    """The capabilities are optional."""
    answer = client.do(Command.VERSION, Version(major=0, minor=0).build())
    require(len(answer.payload) >= Version.SIZE, "a version reply without a version")
    client.info()


@pytest.mark.requirement("vf.version.major")
def test_other_major_version(client: Client) -> None:
    """An unknown major version is refused, or the connection is closed."""
    try:
        answer = client.ask(Command.VERSION, Version(major=77, minor=0).build() + b"{}\0")
    except Closed:
        return
    require(answer.failed, "major version 77 is accepted")


DATA: dict[str, bytes] = {
    "no-json": b"hello\0",
    "no-nul": b'{"capabilities":{}}',
    "array": b"[1,2]\0",
    "negative": b'{"capabilities":{"max_msg_fds":-1}}\0',
    "huge": b'{"capabilities":{"max_data_xfer_size":1e400,"max_dma_maps":%d}}\0' % (1 << 70),
    "strings": b'{"capabilities":{"max_msg_fds":"many"}}\0',
    "deep": b"[" * 900 + b"]" * 900 + b"\0",
    "binary": bytes(range(256)),
    "zero-xfer": b'{"capabilities":{"max_data_xfer_size":0,"max_msg_fds":0}}\0',
}


@pytest.mark.requirement("vf.robust.version-data")
@pytest.mark.parametrize("what", DATA)
def test_version_data_that_makes_no_sense(client: Client, what: str) -> None:
    """Odd version data is refused or taken with defaults."""
    poke(client, Command.VERSION, Version(major=0, minor=0).build() + DATA[what])


def poke(client: Client, command: int, payload: bytes = b"", fds: Any = (), **how: Any) -> None:
    """Send something that may be refused by any means but a hang."""
    try:
        client.send(command, payload, fds, **how)
        client.usable()
    except Closed:
        pass


@pytest.mark.requirement("vf.robust.no-version")
@pytest.mark.parametrize("command", list(Command), ids=lambda c: c.name)
def test_command_before_version(client: Client, command: Command) -> None:
    """Any command as the first one does no harm."""
    poke(client, command, bytes(32))


@pytest.mark.requirement("vf.info")
def test_device_info(session: Client) -> None:
    """GET_INFO describes a PCI device."""
    info = session.info()
    require(info.flags & DeviceFlags.PCI, f"device flags {info.flags:#x}")
    require(info.argsz == 16, f"argsz {info.argsz}")
    require(info.num_regions >= PCI_NUM_REGIONS, f"{info.num_regions} regions")
    require(info.num_irqs >= PCI_NUM_IRQS, f"{info.num_irqs} interrupt types")


@pytest.mark.requirement("vf.region.info", "vf.version.fds-default")
def test_region_info(client: Client) -> None:
    """Every region has an info; a short argsz gets the fixed part and the required argsz."""
    client.negotiate({})  # no max_msg_fds: one descriptor in a message at most
    for index in range(client.info().num_regions):
        fixed, more, fds = client.region_info(index, 4096)
        close_all(fds)
        told = f"{len(fds)} descriptors in a message"
        require(len(fds) <= 1, told, row="vf.version.fds-default")
        require(fixed.index == index, f"info of region {fixed.index}, asked was {index}")
        require(fixed.argsz == RegionInfo.SIZE + len(more), f"argsz {fixed.argsz}")
        caps = bool(fixed.flags & RegionFlags.CAPS)
        require(caps == bool(fixed.cap_offset), f"flags {fixed.flags:#x}, cap {fixed.cap_offset}")
        require(bool(fds) == bool(fixed.flags & RegionFlags.MMAP), "MMAP flag and descriptor")
        short, rest, fds = client.region_info(index, 32)
        close_all(fds)
        require(short.argsz == fixed.argsz, f"argsz {short.argsz} with a short buffer")
        require(not rest, f"{len(rest)} bytes more than argsz allows")
    config = client.region_info(CONFIG)[0]
    require(config.size in (256, 4096), f"configuration space of {config.size} bytes")


@pytest.mark.requirement("vf.robust.region-range", "vf.header.error-short")
@pytest.mark.parametrize("index", [9, 100, 0x7FFFFFFF, 0xFFFFFFFF])
def test_region_that_does_not_exist(session: Client, index: int) -> None:
    """An info of a region beyond num_regions is an error."""
    if index < session.info().num_regions:
        not_applicable("the device has so many regions")
    request = RegionInfo(argsz=32, flags=0, index=index, cap_offset=0, size=0, offset=0)
    answer = session.ask(Command.DEVICE_GET_REGION_INFO, request.build())
    require(answer.failed, f"region {index} has an info")


@pytest.mark.requirement("vf.irq.info")
def test_irq_info(session: Client) -> None:
    """Every interrupt index has an info that echoes its index."""
    for index in range(session.info().num_irqs):
        info = session.irq_info(index)
        require(info.index == index, f"info of index {info.index}, asked was {index}")
        require(info.argsz == 16, f"argsz {info.argsz}")
        require(info.count <= 2048, f"{info.count} interrupts")


@pytest.mark.requirement("vf.robust.irq-range")
@pytest.mark.parametrize("index", [5, 1000, 0xFFFFFFFF])
def test_irq_that_does_not_exist(session: Client, index: int) -> None:
    """An info of an interrupt index that is not there is an error."""
    request = IrqInfo(argsz=16, flags=0, index=index, count=0).build()
    answer = session.ask(Command.DEVICE_GET_IRQ_INFO, request)
    require(answer.failed, f"interrupt index {index} has an info")


@pytest.mark.requirement("vf.irq.set")
def test_interrupt_triggered_by_hand(session: Client) -> None:
    """Eventfds are assigned, triggered by hand, replaced and taken away."""
    index = next((i for i in (2, 0) if session.irq_info(i).count), None)
    if index is None:
        not_applicable("the device has no interrupts")
    first, second = EventFd(), EventFd()
    require(not session.set_irqs(index, 0, [first.fd]).failed, "SET_IRQS failed")
    trigger = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
    message = IrqSet(argsz=20, flags=trigger, index=index, start=0, count=1).build()
    session.do(Command.DEVICE_SET_IRQS, message)
    require(first.wait(1.0), "the eventfd was not triggered")
    require(not session.set_irqs(index, 0, [second.fd]).failed, "replacing failed")
    session.do(Command.DEVICE_SET_IRQS, message)
    require(second.wait(1.0), "the new eventfd was not triggered")
    require(not first.take(), "the old eventfd was triggered")
    off = IrqSet(argsz=20, flags=trigger, index=index, start=0, count=0).build()
    session.do(Command.DEVICE_SET_IRQS, off)
    session.ask(Command.DEVICE_SET_IRQS, message)
    require(not second.wait(0.05), "a disabled interrupt was triggered")
    first.close()
    second.close()


@pytest.mark.requirement("vf.robust.irq-range")
@pytest.mark.parametrize(
    ("index", "flags", "start", "count"),
    [(2, 0x24, 0, 0xFFFFFFFF), (2, 0x24, 0xFFFFFFFF, 2), (2, 0x21, 2047, 10), (9, 0x21, 0, 1),
     (2, 0, 0, 1), (2, 0x3F, 0, 1), (2, 0x22, 0, 8), (2, 0x24, 1 << 31, 1 << 31), (2, 0x23, 0, 1)],
)  # fmt: skip
def test_interrupts_that_make_no_sense(
    session: Client, index: int, flags: int, start: int, count: int
) -> None:
    """Ranges beyond the count, sums that wrap, flags that exclude each other."""
    message = IrqSet(argsz=20, flags=flags, index=index, start=start, count=count).build()
    try:
        answer = session.ask(Command.DEVICE_SET_IRQS, message)
    except Closed:
        return
    require(answer.failed, f"SET_IRQS flags {flags:#x} start {start} count {count} is accepted")
    require(session.usable(), "the connection ended")


@pytest.mark.requirement("vf.region.read", "vf.access.supported")
def test_configuration_space_can_be_read(session: Client) -> None:
    """Reads echo their request and return exactly the requested bytes, in any width."""
    whole = session.read(CONFIG, 0, 64)
    for width in (1, 2, 4):
        parts = b"".join(session.read(CONFIG, at, width) for at in range(0, 64, width))
        require(parts == whole, f"reads of {width} bytes differ from one of 64")


@pytest.mark.requirement("vf.region.write")
@pytest.mark.parametrize("value", [0x5A, 0xA5])
def test_configuration_space_can_be_written(session: Client, value: int) -> None:
    """A write takes effect before its reply, and its reply repeats the request."""
    line = 0x3C  # Interrupt Line: plain storage
    session.write(CONFIG, line, bytes([value]))
    got = session.read(CONFIG, line, 1)[0]
    require(got == value, f"Interrupt Line reads {got:#x} after {value:#x} was written")


@pytest.mark.requirement("vf.robust.region-range")
@pytest.mark.parametrize(
    "command", [Command.REGION_READ, Command.REGION_WRITE], ids=lambda c: c.name
)
@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [(7, 255 + 3841, 4), (7, 4096, 1), (7, (1 << 64) - 2, 4), (7, 0, 0x10000), (8, 0, 4),
     (100, 0, 4), (0xFFFFFFFF, 0, 4), (0, 1 << 40, 4)],
)  # fmt: skip
def test_access_beyond_a_region(
    session: Client, command: Command, region: int, offset: int, count: int
) -> None:
    """Accesses over the end, with sums that wrap, or to no region, are errors."""
    payload = RegionAccess(offset=offset, region=region, count=count).build()
    payload += bytes(count) if command == Command.REGION_WRITE else b""
    try:
        answer = session.ask(command, payload)
    except Closed:
        return
    short = answer.payload[12:16] < count.to_bytes(4, "little")
    require(answer.failed or short, f"{command.name} of {count} at {offset:#x} succeeds")
    require(session.usable(), "the connection ended")


@pytest.mark.requirement("vf.pipelining", "vf.header.any-id")
def test_pipelined_commands(session: Client) -> None:
    """Commands sent in one go, all with one id, are answered in order."""
    payloads = [RegionAccess(offset=4 * i, region=CONFIG, count=4).build() for i in range(16)]
    whole = session.read(CONFIG, 0, 64)
    raw = b"".join(
        Header(id=7, command=Command.REGION_READ, size=32, flags=0, error=0).build() + p
        for p in payloads
    )
    session.tap.send(raw)
    for i in range(16):
        answer = session.expect(Command.REGION_READ, 7)
        require(answer.payload[16:] == whole[4 * i : 4 * i + 4], f"reply {i} is another's")


@pytest.mark.requirement("vf.header.reply", "vf.pipelining")
def test_no_reply(session: Client) -> None:
    """A command with No_reply gets none, and is done before the next one is answered."""
    line = 0x3C  # Interrupt Line: plain storage
    value = session.read(CONFIG, line, 1)[0] ^ 0x5A
    access = RegionAccess(offset=line, region=CONFIG, count=1).build() + bytes([value])
    session.send(Command.REGION_WRITE, access, flags=HeaderFlags.NO_REPLY)
    told = "the write before was not done"
    require(session.read(CONFIG, line, 1)[0] == value, told, row="vf.pipelining")
    require(session.tap.silent(0.03), "a reply although none was wanted")


@pytest.mark.requirement("vf.header.reply")
@pytest.mark.parametrize("chunk", [1, 9, 17])
def test_commands_in_pieces(session: Client, chunk: int) -> None:
    """A command that arrives in pieces is one command."""
    raw = Header(id=9, command=Command.DEVICE_GET_INFO, size=32, flags=0, error=0).build() + INFO
    for start in range(0, len(raw), chunk):
        session.tap.send(raw[start : start + chunk])
        session.tap.silent(0.001)
    require(not session.expect(Command.DEVICE_GET_INFO, 9).failed, "GET_INFO failed")


@pytest.mark.requirement("vf.robust.unknown")
@pytest.mark.parametrize("command", [0, 14, 19, 255, 0xFFFF])
def test_unknown_command(session: Client, command: int) -> None:
    """Commands that no standard knows get an error reply (or the connection ends)."""
    try:
        answer = session.ask(command, bytes(16))
    except Closed:
        return
    require(answer.failed, f"command {command} succeeds")
    require(session.usable(), "the connection ended")


@pytest.mark.requirement("vf.robust.unknown")
@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE], ids=lambda c: c.name)
def test_commands_of_the_server(session: Client, command: Command) -> None:
    """A client that sends the server's commands gets an error."""
    poke(session, command, bytes(32))


@pytest.mark.requirement("vf.robust.size")
@pytest.mark.parametrize("size", [0, 1, 15, 0x7FFFFFFF, 0xFFFFFFFF])
def test_impossible_sizes(session: Client, size: int) -> None:
    """A size below the header's or above all limits ends the connection or is an error."""
    try:
        session.send(Command.DEVICE_GET_INFO, INFO, size=size)
        closed = session.tap.wait_closed(1.0)
    except Closed:
        closed = True
    if not closed:
        try:
            require(session.usable(), "the connection ended")
        except Hang:
            raise Hang(f"the server waits for a message of {size} bytes") from None


@pytest.mark.requirement("vf.robust.size")
@pytest.mark.parametrize("command", list(Command), ids=lambda c: c.name)
@pytest.mark.parametrize("length", [0, 3, 7, 200])
def test_payloads_of_wrong_size(session: Client, command: Command, length: int) -> None:
    """Each command with a payload that is too short or too long."""
    if command == Command.DEVICE_RESET and length == 0:
        not_applicable("this command has no payload")
    poke(session, command, b"\xff" * length)


@pytest.mark.requirement("vf.robust.reply")
@pytest.mark.parametrize("command", [1, 4, 9, 11, 12], ids=str)
def test_reply_that_nobody_asked_for(session: Client, command: int) -> None:
    """An unsolicited reply does no harm."""
    poke(session, command, bytes(32), flags=HeaderFlags.TYPE_REPLY)


@pytest.mark.requirement("vf.io-fds.flags")
def test_region_io_fds(session: Client) -> None:
    """Where sub-regions with descriptors are offered, the reply is well-formed."""
    for index in range(6):
        request = RegionIoFds(argsz=4096, flags=0, index=index, count=0).build()
        answer = session.ask(Command.DEVICE_GET_REGION_IO_FDS, request)
        if answer.failed:
            continue
        fixed = RegionIoFds.parse(answer.payload[:16])
        rest = answer.payload[16:]
        close_all(answer.fds)
        require(fixed.flags == 0, f"flags {fixed.flags:#x}")
        require(fixed.index == index, f"info of region {fixed.index}")
        require(len(rest) == 40 * fixed.count, f"{len(rest)} bytes for {fixed.count} entries")
        for i in range(fixed.count):
            at = 40 * i + 16
            place = int.from_bytes(rest[at : at + 4], "little")
            require(place < len(answer.fds), f"entry {i} names descriptor {place}")


@pytest.mark.requirement("vf.write-multi")
def test_several_writes_in_one_message(client: Client) -> None:
    """REGION_WRITE_MULTI does all its writes, in order."""
    client.negotiate({"max_msg_fds": 8, "write_multiple": True})
    if not client.capabilities.get("write_multiple"):
        not_applicable("write_multiple is not offered")
    line = 0x3C
    body = WriteMulti(wr_cnt=3).build() + b"".join(
        WriteOne(offset=line, region=CONFIG, count=1, data=bytes([v]) + bytes(7)).build()
        for v in (1, 2, 0x42)
    )
    answer = client.do(Command.REGION_WRITE_MULTI, body)
    require(answer.payload == WriteMulti(wr_cnt=3).build(), f"reply {answer.payload.hex()}")
    require(client.read(CONFIG, line, 1)[0] == 0x42, "not every write was done, or not in order")


@pytest.mark.requirement("vf.reset", "program.healthy")
def test_reset_of_any_device(session: Client) -> None:
    """RESET is there when the flags say so, and the connection outlives it."""
    if not session.info().flags & DeviceFlags.RESET:
        not_applicable("the device says that it has no reset")
    session.do(Command.DEVICE_RESET)
    session.info()


@pytest.mark.requirement("vf.version.subset")
def test_twin_socket_only_when_proposed(client: Client) -> None:
    """The twin socket is set up only for a client that supports it, with a good descriptor."""
    offered = {"max_msg_fds": 8, "twin_socket": {"supported": True}}
    answer = client.negotiate(offered)
    twin = client.capabilities.get("twin_socket") or {}
    if not twin.get("supported"):
        not_applicable("the server does not use the twin socket")
    require(twin.get("fd_index", -1) in range(len(answer.fds)), f"{json.dumps(twin)}")
    close_all(answer.fds)
