# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.session``, ``stream``: the byte stream, and everything that can be wrong with it.

vfio-user specification (QEMU 11.1), *Header*, ``VFIO_USER_VERSION``, *Socket Disconnection
Behavior*.  Each case of bad input asserts its one outcome and that no descriptor is left open.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from gadget import CRASH, FAIL, Gadget
from helpers import open_fds
from hypothesis import given, settings
from hypothesis import strategies as st

import vfio_user
from vfio_user import DmaError, Session, SessionLimits, faults
from vfio_user.testing import (
    QEMU_VERSION_DATA,
    LocalClient,
    Ram,
    message,
    split,
)
from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DeviceFeature,
    DmaMap,
    Feature,
    FeatureFlags,
    Header,
    HeaderFlags,
    IrqSet,
    MigState,
    PciIrq,
    PciRegion,
    RegionAccess,
    Version,
)

REPLY, ERROR, NO_REPLY = HeaderFlags.TYPE_REPLY, HeaderFlags.ERROR, HeaderFlags.NO_REPLY


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget()
    yield device
    device.close()


@pytest.fixture
def client(gadget: Gadget) -> Iterator[LocalClient]:
    client = LocalClient(gadget)
    client.negotiate()
    open_before = open_fds()
    yield client
    client.close()
    assert open_fds() == open_before, "descriptors leaked"


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def version(data: bytes = b"", major: int = 0, minor: int = 0) -> bytes:
    return Version(major=major, minor=minor).build() + data


class TestNegotiation:
    """``VFIO_USER_VERSION``"""

    @pytest.fixture
    def fresh(self, gadget: Gadget) -> LocalClient:
        return LocalClient(gadget)

    def test_what_qemu_proposes(self, fresh: LocalClient) -> None:
        caps = fresh.negotiate()
        assert caps.names == {
            "max_msg_fds",
            "max_data_xfer_size",
            "pgsizes",
            "max_dma_maps",
            "migration",
            "write_multiple",
        }
        assert (caps.max_msg_fds, caps.max_data_xfer_size) == (16, 1 << 20)
        assert (caps.pgsizes, caps.write_multiple, caps.migration_pgsize) == (4096, True, 4096)
        assert fresh.session.device.log == [("attached",)]  # type: ignore[attr-defined]

    def test_a_subset_of_what_was_proposed(self, fresh: LocalClient) -> None:
        caps = fresh.negotiate(b'{"capabilities":{"max_dma_maps":1}}' + b" " * 20 + b"\0")
        assert caps.names == {"max_dma_maps"}

    def test_no_json_at_all(self, fresh: LocalClient) -> None:
        caps = fresh.negotiate(b"")
        assert caps.max_msg_fds == 16
        assert fresh.session.client == Capabilities()

    def test_empty_json(self, fresh: LocalClient) -> None:
        reply = fresh.call(Command.VERSION, version(b"{}\0"))
        assert json.loads(reply.payload[Version.SIZE : -1])["capabilities"]

    def test_a_higher_minor_is_answered_with_ours(self, fresh: LocalClient) -> None:
        reply = fresh.call(Command.VERSION, version(minor=7))
        assert Version.parse(reply.payload[: Version.SIZE]) == Version(major=0, minor=0)

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\0\0",
            version(major=1),
            version(major=999),
            version(b"{}"),
            version(b"{\0"),
            version(b'{"capabilities": "23"}\0'),
            version(b'{"capabilities": {"max_msg_fds": -1}}\0'),
        ],
    )
    def test_malformed_ends_the_connection(self, fresh: LocalClient, payload: bytes) -> None:
        fresh.call(Command.VERSION, payload, expect=errno.EINVAL)
        assert not fresh.session.is_open
        assert not fresh.session.device.log  # type: ignore[attr-defined]

    @pytest.mark.parametrize("command", [*(set(Command) - {Command.VERSION}), 0, 999])
    def test_nothing_else_comes_first(self, fresh: LocalClient, command: int) -> None:
        fresh.call(command, bytes(32), expect=errno.EINVAL)
        assert not fresh.session.is_open

    def test_only_once(self, client: LocalClient) -> None:
        client.call(Command.VERSION, version(), expect=errno.EINVAL)
        assert client.session.is_open

    def test_twin_socket_only_if_both_want_it(self, gadget: Gadget) -> None:
        wanted = b'{"capabilities":{"twin_socket":{"supported":true}}}' + b" " * 20 + b"\0"
        refused = LocalClient(gadget).negotiate(wanted)
        assert not refused.twin_socket
        both = LocalClient(gadget, twin=True)
        reply = both.call(Command.VERSION, version(wanted))
        caps = Capabilities.parse(reply.payload[Version.SIZE :])
        assert (caps.twin_socket, caps.twin_socket_fd_index, len(reply.fds)) == (True, 0, 1)
        os.close(reply.fds[0])
        both.close()
        unasked = LocalClient(gadget, twin=True)
        assert not unasked.negotiate().twin_socket
        unasked.close()


class TestBadInput:
    """Headers and payloads that cannot be."""

    @pytest.mark.parametrize("size", [0, 15])
    def test_too_small_ends_the_connection(self, client: LocalClient, size: int) -> None:
        head = Header(id=0xBAD1, command=8, size=size, flags=0, error=0)
        client.send(head.build())
        assert [(r.id, r.error) for r in client.inbox] == [(0xBAD1, errno.EINVAL)]
        assert not client.session.is_open

    def test_too_large_ends_the_connection(self, client: LocalClient) -> None:
        limit = client.session.limits.max_message
        head = Header(id=1, command=8, size=limit + 1, flags=0, error=0)
        client.send(head.build())
        assert client.inbox[0].error == errno.EINVAL
        assert not client.session.is_open

    def test_messages_before_a_bad_header_are_answered_first(self, client: LocalClient) -> None:
        good = message(Command.DEVICE_RESET, msg_id=1)
        bad = Header(id=2, command=13, size=3, flags=0, error=0).build()
        client.send(good + bad + good)
        assert [(r.id, r.error) for r in client.inbox] == [(1, 0), (2, errno.EINVAL)]

    def test_the_largest_message_is_fine(self, client: LocalClient) -> None:
        data = bytes(client.session.limits.max_data_xfer_size)
        client.write(2, 0, data, expect=errno.EINVAL)  # past the region, but well-formed
        assert client.session.is_open

    @pytest.mark.parametrize("command", [0, 14, 19, 999, 0xFFFF, Command.DMA_READ])
    def test_unknown_commands(self, client: LocalClient, command: int) -> None:
        client.call(command, b"\0", expect=errno.EINVAL)
        assert client.session.is_open

    @pytest.mark.parametrize(
        "command", sorted(set(Command) - {Command.DMA_READ, Command.DMA_WRITE, Command.VERSION})
    )
    def test_truncated_payloads(self, client: LocalClient, command: Command) -> None:
        payload = b"\0" * 3
        client.call(command, payload, expect=errno.EINVAL)
        assert client.session.is_open

    def test_unsolicited_reply(self, client: LocalClient) -> None:
        client.send(message(Command.DEVICE_SET_IRQS, flags=REPLY, msg_id=0xBAD2))
        assert [(r.id, r.error) for r in client.inbox] == [(0xBAD2, errno.EINVAL)]

    def test_an_unsolicited_error_reply_is_not_answered(self, client: LocalClient) -> None:
        client.send(message(Command.DMA_READ, flags=REPLY | ERROR))
        assert client.inbox == []

    @pytest.mark.parametrize(
        "command", sorted(set(Command) - {Command.DMA_MAP, Command.DEVICE_SET_IRQS})
    )
    def test_descriptors_where_none_belong(
        self, client: LocalClient, eventfd: int, command: Command
    ) -> None:
        before = open_fds()
        client.call(command, bytes(16), [eventfd, eventfd], expect=errno.EINVAL)
        assert open_fds() == before

    def test_more_descriptors_than_negotiated(self, client: LocalClient, eventfd: int) -> None:
        before = open_fds()
        request = IrqSet(argsz=20, flags=0x24, index=PciIrq.MSIX, start=0, count=17)
        client.call(Command.DEVICE_SET_IRQS, request.build(), [eventfd] * 17, expect=errno.EINVAL)
        assert open_fds() == before

    def test_a_bad_request_closes_its_descriptors(self, client: LocalClient, eventfd: int) -> None:
        before = open_fds()
        request = IrqSet(argsz=20, flags=0x22, index=PciIrq.MSIX, start=0, count=1)
        client.call(
            Command.DEVICE_SET_IRQS, request.build(), [eventfd, eventfd], expect=errno.EINVAL
        )
        assert open_fds() == before

    def test_a_bad_size_closes_the_descriptors_of_its_message(
        self, client: LocalClient, eventfd: int
    ) -> None:
        before = open_fds()
        client.send(Header(id=1, command=2, size=1, flags=0, error=0).build(), [eventfd])
        assert open_fds() == before

    def test_what_comes_after_the_end_is_dropped(self, client: LocalClient, eventfd: int) -> None:
        before = open_fds()
        client.send(Header(id=1, command=2, size=1, flags=0, error=0).build())
        client.inbox.clear()
        client.send(message(Command.DEVICE_RESET), [eventfd])
        assert client.inbox == []
        assert open_fds() == before

    def test_message_ids_may_be_reused(self, client: LocalClient) -> None:
        one = message(Command.DEVICE_RESET, msg_id=7)
        client.send(one * 3)
        assert [r.id for r in client.inbox] == [7, 7, 7]

    def test_a_callback_that_refuses(self, client: LocalClient) -> None:
        client.write(0, FAIL, b"x", expect=errno.ENOSPC)

    def test_a_callback_that_fails(self, client: LocalClient) -> None:
        client.write(0, CRASH, b"x", expect=errno.EIO)
        client.write(0, 0, b"x")

    def test_no_reply_means_no_reply(self, client: LocalClient) -> None:
        request = RegionAccess(offset=8, region=0, count=4).build() + b"abcd"
        client.post(Command.REGION_WRITE, request)
        assert client.read(0, 8, 4) == b"abcd"
        client.post(999, b"")
        client.post(Command.REGION_WRITE, b"short")


def a_conversation() -> bytes:
    region = RegionAccess(offset=0, region=0, count=4).build()
    parts = [
        (Command.VERSION, version(QEMU_VERSION_DATA)),
        (Command.DEVICE_GET_INFO, (16).to_bytes(4, "little") + bytes(12)),
        (Command.REGION_WRITE, region + b"wxyz"),
        (Command.REGION_READ, region),
        (Command.DEVICE_RESET, b""),
        (999, b"?"),
    ]
    return b"".join(message(c, p, msg_id=i) for i, (c, p) in enumerate(parts))


class TestStream:
    """Vectors whole, byte by byte, with trailing bytes, and with descriptors at odd places."""

    def replies(self, chunks: list[tuple[bytes, list[int]]]) -> list[tuple[int, int, bytes]]:
        device = Gadget()
        session = Session(device)
        found = []
        for data, fds in chunks:
            session.feed(data, [os.dup(fd) for fd in fds])
            for out, out_fds in session.take_output():
                head, payload = split(out)
                found.append((head.id, head.error, payload))
                for fd in out_fds:
                    os.close(fd)
        session.receive_eof()
        device.close()
        return found

    def test_whole_and_byte_by_byte(self) -> None:
        conversation = a_conversation()
        whole = self.replies([(conversation, [])])
        assert [(i, e) for i, e, _ in whole] == [*((i, 0) for i in range(5)), (5, errno.EINVAL)]
        assert whole[3][2][16:] == b"wxyz"
        assert self.replies([(bytes([b]), []) for b in conversation]) == whole

    @given(cuts=st.lists(st.integers(0, 400), max_size=8))
    @settings(max_examples=50, deadline=None)
    def test_cut_anywhere(self, cuts: list[int]) -> None:
        conversation = a_conversation()
        places = sorted({0, len(conversation), *(c for c in cuts if c < len(conversation))})
        chunks: list[tuple[bytes, list[int]]] = [
            (conversation[a:b], []) for a, b in pairwise(places)
        ]
        assert self.replies(chunks) == self.replies([(conversation, [])])

    def test_trailing_bytes_wait(self) -> None:
        conversation = a_conversation()
        assert self.replies([(conversation + b"\1" * 15, [])]) == self.replies([(conversation, [])])

    @pytest.mark.parametrize("cut", [1, 15, 16, 17, 47, 48])
    def test_descriptors_belong_to_the_last_message_begun(self, cut: int) -> None:
        """A read that brings descriptors ends after the bytes that they were sent with."""
        ram = Ram(0x10000, 0x10000)
        before = open_fds()
        hello = message(Command.VERSION, version(QEMU_VERSION_DATA))
        reset = message(Command.DEVICE_RESET, msg_id=2)
        request = DmaMap(argsz=32, flags=3, offset=0, address=ram.address, size=ram.size)
        mapping = message(Command.DMA_MAP, request.build(), msg_id=3)
        found = self.replies(
            [(hello + reset + mapping[:cut], [ram.fd]), (mapping[cut:] + reset, [])]
        )
        assert [(i, e) for i, e, _ in found] == [(1, 0), (2, 0), (3, 0), (2, 0)]
        assert open_fds() == before
        ram.close()


class TestEnd:
    """*Socket Disconnection Behavior*"""

    def test_the_device_stays_and_the_clients_things_go(self, gadget: Gadget, eventfd: int) -> None:
        before = open_fds()
        client = LocalClient(gadget)
        client.negotiate()
        ram = Ram(0x10000, 0x10000)
        client.map(ram)
        client.assign(PciIrq.MSIX, [eventfd, eventfd])
        client.write(0, 0x20, b"kept")
        client.close()
        client.close()  # twice is once
        assert gadget.dma.regions == []
        assert gadget.log[-2:] == [("detached",), ("unmap", ram.address, ram.size)]
        ram.close()
        assert open_fds() == before
        second = LocalClient(gadget)
        second.negotiate()
        assert second.read(0, 0x20, 4) == b"kept"
        second.close()

    def test_in_the_middle_of_a_message(self, gadget: Gadget, eventfd: int) -> None:
        client = LocalClient(gadget)
        client.negotiate()
        before = open_fds()
        client.send(message(Command.DMA_MAP, bytes(32))[:20], [eventfd])
        assert open_fds() == before + 1
        client.close()
        assert open_fds() == before

    def test_before_negotiation(self, gadget: Gadget) -> None:
        LocalClient(gadget).close()
        assert gadget.log == []

    def test_output_that_was_never_sent_is_closed(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate()
        before = open_fds()
        request = (32).to_bytes(4, "little") + bytes(4) + (2).to_bytes(4, "little") + bytes(20)
        client.session.feed(message(Command.DEVICE_GET_REGION_INFO, request))
        assert open_fds() == before + 1
        client.close()
        assert open_fds() == before

    def test_too_many_commands_waiting(self, gadget: Gadget) -> None:
        """The device waits for client memory, one command for the device, the others for that."""
        client = LocalClient(gadget, limits=SessionLimits(max_queued=3))
        client.negotiate()
        client.map(Ram(0x10000, 0x1000), mapped=False)
        stop = DeviceFeature(argsz=16, flags=FeatureFlags.SET | Feature.MIG_DEVICE_STATE).build()
        stop += MigState(device_state=1, data_fd=0).build()
        client.before_dma = lambda: client.session.feed(
            message(Command.DEVICE_FEATURE, stop) + message(Command.DEVICE_GET_INFO, bytes(16)) * 4
        )
        with pytest.raises(DmaError):
            gadget.dma.read(0x10000, 4)
        assert "more commands" in (client.session.error or "")
        client.close()

    def test_pipelined_writes_are_not_commands_that_wait(self, gadget: Gadget) -> None:
        """2000 posted writes in one piece were refused before one of them was looked at."""
        client = LocalClient(gadget)
        client.negotiate()
        write = RegionAccess(offset=8, region=0, count=1).build() + b"x"
        client.send(message(Command.REGION_WRITE, write, flags=HeaderFlags.NO_REPLY) * 2000)
        assert client.session.is_open
        assert gadget.log.count(("write", 8, b"x")) == 2000
        client.close()

    def test_a_message_that_is_neither_command_nor_reply(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate()
        client.send(message(Command.DEVICE_GET_INFO, bytes(16), flags=2))
        assert client.inbox.pop().error == errno.EINVAL
        client.send(message(Command.DEVICE_RESET, flags=2 | HeaderFlags.NO_REPLY))
        assert ("reset",) not in gadget.log
        client.close()

    def test_a_fault_of_the_device_is_logged_in_full_once(
        self, gadget: Gadget, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There was no traceback; and the guest decides how often this happens."""
        monkeypatch.setattr(faults, "_reported", set())
        client = LocalClient(gadget)
        client.negotiate()
        for _ in range(100):
            client.write(0, CRASH, b"x", expect=errno.EIO)
        assert caplog.text.count("Traceback") == 1
        assert caplog.text.count("REGION_WRITE") == 1
        client.close()


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(sorted(Command)), st.integers(0, 0xFFFF)),
            st.binary(max_size=80),
            st.sampled_from([0, 0, 0, 1, 0x10, 0x20, 0x21, 2]),
            st.integers(0, 3),
        ),
        max_size=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_sequence_of_messages_is_answered_or_ends_the_connection(
    messages: list[tuple[int, bytes, int, int]],
) -> None:
    """Every command gets exactly one reply (or none, as asked); nothing escapes; nothing leaks."""
    before = open_fds()
    device = Gadget()
    client = LocalClient(device)
    client.negotiate()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    for number, (command, payload, flags, fds) in enumerate(messages):
        client.inbox.clear()
        closed = not client.session.is_open
        client.send(message(command, payload, flags=flags, msg_id=number), [fd] * fds)
        client.run()
        due = not closed and flags & 0x10 == 0 and flags & 0x21 != 0x21
        assert [r.id for r in client.inbox] == ([number] if due else [])
        for reply in client.inbox:
            for got in reply.fds:
                os.close(got)
    client.close()
    device.close()
    os.close(fd)
    assert open_fds() == before


def test_a_client_that_answers_no_dma_message_is_let_go(gadget: Gadget) -> None:
    """Message ids are 16 bits, and one that may still be answered is not used again."""
    client = LocalClient(gadget)
    client.negotiate()
    client.map(Ram(0x10000, 0x1000), mapped=False)
    client.silent = True
    for _ in range(1 << 16):
        with pytest.raises(DmaError):
            gadget.dma.read(0x10000, 4)
        if not client.session.is_open:
            break
    assert "no DMA message" in client.session.error
    assert client.session.requests.sent < 2000
    client.close()


def test_descriptors_that_come_with_no_message_are_not_kept(gadget: Gadget) -> None:
    client = LocalClient(gadget)
    client.negotiate()
    fd, before = os.open("/dev/null", os.O_RDONLY), open_fds()
    head = message(Command.DMA_MAP, bytes(600))
    for at in range(12):
        client.send(head[at : at + 1], [fd] * 50)
    assert "descriptors" in client.session.error
    assert open_fds() == before
    os.close(fd)
    client.close()


def test_the_guest_cannot_fill_the_log(gadget: Gadget, caplog: pytest.LogCaptureFixture) -> None:
    client = LocalClient(gadget)
    client.negotiate()
    with caplog.at_level("INFO"):
        client.read(PciRegion.BAR0, 1 << 40, 4, expect=errno.EINVAL)
        assert not caplog.text
        client.call(Command.DMA_UNMAP, bytes(24), expect=errno.EINVAL)
        assert "DMA_UNMAP refused" in caplog.text
    client.close()


class TestWhyItEnded:
    def test_an_orderly_end_has_no_error(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate()
        client.close()
        assert (client.session.is_open, client.session.error, gadget.client_error) == (
            False,
            None,
            None,
        )

    def test_the_device_learns_the_first_error(self, gadget: Gadget) -> None:
        """Over vfio-user, FRONTEND_DISCONNECTED said that every end was orderly."""
        client = LocalClient(gadget)
        client.negotiate()
        client.send(bytes(16))
        client.session.close("another error")
        client.close()
        assert "message of 0 bytes" in (client.session.error or "")
        assert gadget.client_error == client.session.error


def test_no_import_circle_in_the_package() -> None:
    """``session``, ``handlers`` and ``remote`` imported each other."""
    folder = Path(vfio_user.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    uses = {
        name: set(re.findall(r"from vfio_user\.(\w+) import", (folder / f"{name}.py").read_text()))
        for name in names
    }
    while uses:
        free = {name for name, needs in uses.items() if not needs & set(uses)}
        assert free, f"an import circle among {sorted(uses)}"
        for name in free:
            del uses[name]
