# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.migration``, ``features``: the states, the way between them, and the data stream.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DEVICE_FEATURE``, *Direct State Transitions*,
*Complex State Transitions*, ``VFIO_USER_MIG_DATA_READ`` and ``_WRITE``.  Paths are not compared
with the table of the code but with what a search along the specification's arcs finds.
"""

from __future__ import annotations

import errno
import itertools
from collections import deque
from collections.abc import Iterator

import pytest
from gadget import Gadget

from vfio_user import MigrationMachine, PciDevice, RequestError, SessionLimits
from vfio_user.migration import MAX_STATE_SIZE, NEXT_HOP
from vfio_user.testing import QEMU_VERSION_DATA, LocalClient
from virtio_formats.vfio_user import (
    MIG_ARCS,
    Command,
    DeviceFeature,
    DeviceState,
    Feature,
    FeatureFlags,
    MigData,
    MigState,
)

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
S = DeviceState
SAVING = {S.PRE_COPY, S.STOP_COPY}
REACHABLE = {S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING, S.PRE_COPY}


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget()
    yield device
    device.close()


@pytest.fixture
def client(gadget: Gadget) -> LocalClient:
    client = LocalClient(gadget, limits=SessionLimits(max_data_xfer_size=64))
    client.negotiate()
    return client


def feature(
    client: LocalClient, flags: int, data: bytes = b"", *, argsz: int = 64, expect: int = 0
) -> bytes:
    request = DeviceFeature(argsz=argsz, flags=flags).build() + data
    reply = client.call(Command.DEVICE_FEATURE, request, expect=expect)
    return reply.payload[DeviceFeature.SIZE :]


def go(client: LocalClient, state: int, *, expect: int = 0) -> None:
    data = MigState(device_state=state, data_fd=0).build()
    answer = feature(client, Feature.MIG_DEVICE_STATE | SET, data, argsz=16, expect=expect)
    assert expect or answer == data


def shortest(start: DeviceState, end: DeviceState) -> list[DeviceState] | None:
    """Breadth first along the arcs, never through a saving state; None: there is no way."""
    if (start, end) == (S.STOP_COPY, S.PRE_COPY):
        return None  # explicitly not allowed
    queue: deque[list[DeviceState]] = deque([[start]])
    while queue:
        path = queue.popleft()
        if path[-1] == end:
            return path[1:]
        if len(path) > 1 and path[-1] in SAVING:
            continue
        queue.extend([*path, b] for a, b in MIG_ARCS if a == path[-1] and b not in path)
    return None


class TestStates:
    @pytest.mark.parametrize(("start", "end"), list(itertools.product(S, S)))
    def test_the_way_is_the_shortest_that_is_allowed(
        self, start: DeviceState, end: DeviceState
    ) -> None:
        device = Gadget()
        machine = MigrationMachine(device)
        machine.state = start
        if start is S.RESUMING:
            machine._incoming += b"state"
        expected = [] if start == end else shortest(start, end)
        if expected is None or (start == end and start not in REACHABLE):
            if start != end:
                with pytest.raises(RequestError) as caught:
                    machine.go(end)
                assert caught.value.errno == errno.EINVAL
            assert machine.state == start
        else:
            assert machine.go(end) == expected
            assert machine.state == end
        device.close()

    def test_error_is_no_target_and_no_start(self) -> None:
        assert not [pair for pair in NEXT_HOP if S.ERROR in pair]

    @pytest.mark.parametrize("state", [S.ERROR, S.RUNNING_P2P, S.PRE_COPY_P2P, 8, 0xABCD])
    def test_states_that_cannot_be_asked_for(self, client: LocalClient, state: int) -> None:
        go(client, state, expect=errno.EINVAL)
        assert client.session.device.migration.state == S.RUNNING

    def test_get_says_where_it_is(self, client: LocalClient) -> None:
        for state in (S.RUNNING, S.PRE_COPY, S.STOP_COPY, S.STOP, S.RESUMING):
            go(client, state)
            data = feature(client, Feature.MIG_DEVICE_STATE | GET)
            assert MigState.parse(data).device_state == state
            client.session.device.state = b"state"  # type: ignore[attr-defined]
            if state is S.RESUMING:
                self.send(client, b"state")
                go(client, S.RUNNING)

    def send(self, client: LocalClient, data: bytes, expect: int = 0) -> None:
        head = MigData(argsz=8 + len(data), size=len(data)).build()
        client.call(Command.MIG_DATA_WRITE, head + data, expect=expect)

    def test_the_device_stands_still_where_it_should(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        gadget.log.clear()
        for state in (S.PRE_COPY, S.STOP_COPY, S.STOP, S.RUNNING):
            go(client, state)
        assert gadget.log == [("running", False), ("running", True)]

    def test_a_device_that_refuses_stays(self, gadget: Gadget, client: LocalClient) -> None:
        go(client, S.RESUMING)
        self.send(client, b"rubbish")
        go(client, S.RUNNING, expect=errno.EINVAL)
        assert gadget.migration.state == S.RESUMING

    def test_reset_leads_back_from_anywhere(self, gadget: Gadget, client: LocalClient) -> None:
        for state in (S.ERROR, S.STOP_COPY, S.RESUMING):
            gadget.migration.state = state
            client.call(Command.DEVICE_RESET)
            assert gadget.migration.state == S.RUNNING


class TestData:
    def read(self, client: LocalClient, size: int, *, argsz: int = 0, expect: int = 0) -> bytes:
        request = MigData(argsz=argsz or 8 + size, size=size).build()
        reply = client.call(Command.MIG_DATA_READ, request, expect=expect)
        if expect:
            return b""
        head = MigData.parse(reply.payload[:8])
        assert (head.argsz, head.size) == (len(reply.payload), len(reply.payload) - 8)
        return reply.payload[8:]

    def write(self, client: LocalClient, data: bytes, *, size: int = -1, expect: int = 0) -> None:
        size = len(data) if size < 0 else size
        head = MigData(argsz=8 + size, size=size).build()
        client.call(Command.MIG_DATA_WRITE, head + data, expect=expect)

    def test_a_state_moves_to_another_device(self, gadget: Gadget, client: LocalClient) -> None:
        gadget.state = b"state" + bytes(range(100))
        go(client, S.PRE_COPY)
        assert self.read(client, 64) == b""
        go(client, S.STOP_COPY)
        stream = b""
        while True:
            part = self.read(client, 40)
            stream += part
            if len(part) < 40:
                break
        assert self.read(client, 40) == b""
        other = Gadget()
        second = LocalClient(other, limits=SessionLimits(max_data_xfer_size=64))
        second.negotiate()
        go(second, S.RESUMING)
        for at in range(0, len(stream), 33):
            self.write(second, stream[at : at + 33])
        go(second, S.RUNNING)
        assert other.state == gadget.state == stream
        other.close()

    def test_only_in_their_states(self, gadget: Gadget, client: LocalClient) -> None:
        for state in (S.RUNNING, S.STOP, S.RESUMING):
            gadget.migration.state = state
            self.read(client, 4, expect=errno.EINVAL)
        for state in (S.RUNNING, S.STOP, S.STOP_COPY, S.PRE_COPY):
            gadget.migration.state = state
            self.write(client, b"data", expect=errno.EINVAL)

    def test_sizes(self, client: LocalClient) -> None:
        go(client, S.STOP_COPY)
        self.read(client, 65, expect=errno.EINVAL)
        self.read(client, 8, argsz=15, expect=errno.EINVAL)
        client.call(Command.MIG_DATA_READ, bytes(7), expect=errno.EINVAL)
        go(client, S.RESUMING)
        self.write(client, bytes(65), expect=errno.EINVAL)
        self.write(client, b"abc", size=4, expect=errno.EINVAL)
        self.write(client, b"abcd", size=3, expect=errno.EINVAL)

    def test_more_than_a_device_can_have(self, gadget: Gadget) -> None:
        gadget.migration.go(S.RESUMING)
        gadget.migration.write(bytes(MAX_STATE_SIZE))
        with pytest.raises(RequestError) as caught:
            gadget.migration.write(b"x")
        assert caught.value.errno == errno.EFBIG

    def test_a_device_that_fails_to_save(self, gadget: Gadget, client: LocalClient) -> None:
        def refuse(what: str) -> None:
            raise RequestError(errno.EBUSY, what)

        gadget.refuse = refuse
        go(client, S.STOP_COPY, expect=errno.EBUSY)


class TestDeviceFeature:
    def test_what_is_supported(self, client: LocalClient) -> None:
        assert feature(client, Feature.MIGRATION | GET, argsz=16) == (5).to_bytes(8, "little")

    @pytest.mark.parametrize(
        ("index", "methods"),
        [
            (Feature.MIGRATION, GET),
            (Feature.MIG_DEVICE_STATE, GET | SET),
            (Feature.DMA_LOGGING_START, SET),
            (Feature.DMA_LOGGING_STOP, SET),
            (Feature.DMA_LOGGING_REPORT, GET),
        ],
    )
    def test_probing(self, client: LocalClient, index: Feature, methods: FeatureFlags) -> None:
        for asked in (FeatureFlags(0), GET, SET, GET | SET):
            request = DeviceFeature(argsz=8, flags=index | PROBE | asked).build()
            allowed = asked & methods == asked
            reply = client.call(
                Command.DEVICE_FEATURE, request, expect=0 if allowed else errno.EINVAL
            )
            assert not allowed or reply.payload == request

    @pytest.mark.parametrize(
        ("flags", "data", "argsz"),
        [
            (Feature.MIGRATION | SET, b"", 64),
            (Feature.MIGRATION | GET | SET, b"", 64),
            (Feature.MIG_DEVICE_STATE | GET | SET, bytes(8), 64),
            (Feature.MIGRATION, b"", 64),
            (Feature.MIGRATION | GET | 1 << 19, b"", 64),
            (Feature.MIGRATION | GET | 1 << 31, b"", 64),
            (0 | GET, b"", 64),
            (3 | GET, b"", 64),
            (0xFFFF | PROBE, b"", 64),
            (Feature.MIGRATION | PROBE, b"", 2),
            (Feature.MIGRATION | GET, b"", 8),
            (Feature.MIGRATION | GET, b"", 15),
            (Feature.MIG_DEVICE_STATE | SET, MigState(device_state=1, data_fd=0).build(), 8),
            (Feature.MIG_DEVICE_STATE | SET, bytes(7), 64),
            (Feature.MIG_DEVICE_STATE | SET, bytes(9), 64),
        ],
    )
    def test_refused(self, client: LocalClient, flags: int, data: bytes, argsz: int) -> None:
        feature(client, flags, data, argsz=argsz, expect=errno.EINVAL)
        assert client.session.device.migration.state == S.RUNNING

    def test_short(self, client: LocalClient) -> None:
        client.call(Command.DEVICE_FEATURE, bytes(7), expect=errno.EINVAL)

    def test_a_device_that_does_not_migrate(self, gadget: Gadget, client: LocalClient) -> None:
        gadget.migratable = False  # type: ignore[misc]
        for flags in (Feature.MIGRATION | GET, Feature.MIG_DEVICE_STATE | GET | PROBE):
            feature(client, flags, expect=errno.EINVAL)
        feature(client, Feature.DMA_LOGGING_START | SET | PROBE)

    def test_the_default_device_has_no_state(self) -> None:
        for act in (lambda: PciDevice.save_state(None), lambda: PciDevice.load_state(None, b"")):  # type: ignore[arg-type]
            with pytest.raises(RequestError):
                act()


class TestFailures:
    def refuse(self, gadget: Gadget, what: str) -> None:
        def fail(asked: str) -> None:
            if asked == what:
                raise RequestError(errno.ENOSPC, what)

        gadget.refuse = fail

    @pytest.mark.parametrize("start", [S.STOP, S.RUNNING, S.PRE_COPY])
    def test_a_save_that_failed_is_not_an_empty_state(
        self, gadget: Gadget, client: LocalClient, start: DeviceState
    ) -> None:
        """The second try found the device in STOP_COPY already, with nothing to read."""
        go(client, start)
        self.refuse(gadget, "save")
        for _ in range(2):
            go(client, S.STOP_COPY, expect=errno.ENOSPC)
        assert gadget.migration.state == (S.PRE_COPY if start is S.PRE_COPY else S.STOP)
        self.refuse(gadget, "")
        go(client, S.STOP_COPY)
        assert gadget.migration.read(64) == b"state"

    @pytest.mark.parametrize("what", ["stop", "continue"])
    def test_a_device_that_can_neither_stop_nor_continue(
        self, gadget: Gadget, client: LocalClient, what: str
    ) -> None:
        if what == "continue":
            go(client, S.STOP)
        self.refuse(gadget, what)
        go(client, S.RUNNING if what == "continue" else S.STOP, expect=errno.ENOSPC)
        assert feature(client, Feature.MIG_DEVICE_STATE | GET)[0] == S.ERROR
        go(client, S.RUNNING, expect=errno.EINVAL)
        self.refuse(gadget, "")
        client.call(Command.DEVICE_RESET)
        assert feature(client, Feature.MIG_DEVICE_STATE | GET)[0] == S.RUNNING
        assert gadget.log[-2:] == [("running", True), ("reset",)]


class Streaming(Gadget):
    """A device that gives and takes its state in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = [b"early-1,", b"early-2,"]
        self.made = 0
        self.loaded = bytearray()

    def save_running(self) -> bytes:
        assert self.migration.is_running
        return self.ready.pop(0) if self.ready else b""

    def save_state(self) -> Iterator[bytes]:  # type: ignore[override]
        for number in range(20):
            self.refuse(f"piece {number}")
            self.made += 1
            yield bytes([number]) * 10

    def load_piece(self, data: bytes, first: bool) -> bool:
        if first:
            self.loaded.clear()
        self.loaded += data
        return True

    def load_state(self, state: bytes) -> None:
        assert state == b""
        if len(self.loaded) != 216:
            raise RequestError(errno.EINVAL, "not a whole state")


class TestStreaming:
    STREAM = b"early-1,early-2," + b"".join(bytes([number]) * 10 for number in range(20))

    @pytest.fixture
    def device(self) -> Iterator[Streaming]:
        device = Streaming()
        yield device
        device.close()

    def test_pieces_are_made_as_they_are_read(self, device: Streaming) -> None:
        machine = device.migration
        machine.go(S.PRE_COPY)
        assert machine.read(5) == b"early"
        machine.go(S.STOP_COPY)
        assert device.made == 1, "the first, so that a failure is the answer of the transition"
        stream = b"early" + machine.read(30)
        assert device.made < 4
        while part := machine.read(30):
            stream += part
        assert stream == self.STREAM.replace(b"early-2,", b""), "what was not ready is not lost"
        assert device.ready == [b"early-2,"]

    def test_the_stream_reaches_another_device(self, device: Streaming) -> None:
        other = Streaming()
        device.migration.go(S.PRE_COPY)
        stream = device.migration.read(8) + device.migration.read(64)
        assert device.migration.read(64) == b""
        device.migration.go(S.STOP_COPY)
        while part := device.migration.read(7):
            stream += part
        assert stream == self.STREAM
        other.migration.go(S.RESUMING)
        for at in range(0, len(stream), 50):
            other.migration.write(stream[at : at + 50])
            assert other.loaded == stream[: at + 50]
        other.migration.go(S.RUNNING)
        other.migration.go(S.RESUMING)  # again, and only half of it
        other.migration.write(stream[:100])
        with pytest.raises(RequestError):
            other.migration.go(S.RUNNING)
        assert (other.migration.state, len(other.loaded)) == (S.RESUMING, 100)
        other.close()

    def test_a_piece_that_fails_is_not_the_end(self, device: Streaming) -> None:
        def fail(asked: str) -> None:
            if asked == "piece 3":
                raise RequestError(errno.ENOSPC, asked)

        device.refuse = fail
        device.migration.go(S.STOP_COPY)
        assert len(device.migration.read(30)) == 30
        codes = []
        for _ in range(3):
            with pytest.raises(RequestError) as caught:
                device.migration.read(30)
            codes.append(caught.value.errno)
        assert codes == [errno.ENOSPC, errno.EIO, errno.EIO]
        device.migration.go(S.STOP)
        device.refuse = lambda what: None
        device.migration.go(S.STOP_COPY)
        assert device.migration.read(1000) == self.STREAM[16:]

    def test_as_a_value(self, device: Streaming) -> None:
        device.migration.go(S.STOP_COPY)
        device.migration.read(30)
        saved = device.migration.save()
        assert saved.outgoing == self.STREAM[16 + 30 :]
        assert device.migration.read(1000) == saved.outgoing
        device.migration.go(S.RESUMING)
        device.migration.write(b"x")
        with pytest.raises(RequestError) as caught:
            device.migration.save()
        assert caught.value.errno == errno.EBUSY


class TestDeferredWork:
    """Memory must not change after the state was saved, or after a reset."""

    def work(self, gadget: Gadget) -> None:
        gadget.log.append(("work",))

    def test_it_is_dropped_by_a_reset(self, gadget: Gadget, client: LocalClient) -> None:
        gadget.defer(lambda: self.work(gadget))
        client.call(Command.DEVICE_RESET)
        client.run()
        assert ("work",) not in gadget.log

    def test_it_is_finished_before_the_device_stops(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        gadget.defer(lambda: gadget.defer(lambda: self.work(gadget)))
        go(client, S.STOP_COPY)
        assert gadget.log[-2:] == [("work",), ("running", False)]

    def test_it_is_held_while_the_device_stands_still(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        go(client, S.STOP)
        gadget.defer(lambda: self.work(gadget))
        client.run()
        go(client, S.STOP_COPY)
        go(client, S.STOP)
        assert ("work",) not in gadget.log
        go(client, S.RUNNING)
        assert gadget.log[-2:] == [("running", True), ("work",)]

    def test_work_without_end_does_not_keep_the_device_from_stopping(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        def again() -> None:
            gadget.defer(again)

        again()
        go(client, S.STOP)
        assert gadget.migration.state == S.STOP


class TestClientsThatDisconnect:
    @pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY, S.RESUMING])
    def test_the_state_is_retained(
        self, gadget: Gadget, client: LocalClient, state: DeviceState
    ) -> None:
        """*Socket Disconnection Behavior*: it became RUNNING."""
        go(client, state)
        client.close()
        again = LocalClient(gadget)
        again.negotiate()
        data = feature(again, Feature.MIG_DEVICE_STATE | GET)
        assert MigState.parse(data).device_state == state
        again.close()

    @pytest.mark.parametrize("how", ["reset", "run"])
    def test_the_next_client_revives_the_device(
        self, gadget: Gadget, client: LocalClient, how: str
    ) -> None:
        go(client, S.STOP_COPY)
        client.close()
        again = LocalClient(gadget)
        again.negotiate()
        gadget.defer(lambda: gadget.log.append(("work",)))
        again.run()
        assert ("work",) not in gadget.log
        if how == "reset":
            again.call(Command.DEVICE_RESET)
            gadget.defer(lambda: gadget.log.append(("work",)))
            again.run()
        else:
            go(again, S.RUNNING)
        assert gadget.migration.state == S.RUNNING
        assert ("work",) in gadget.log
        again.close()


def test_max_data_xfer_size_does_not_limit_device_feature(gadget: Gadget) -> None:
    """A client that takes four bytes in an access could not even ask for the state."""
    client = LocalClient(gadget)
    client.negotiate(QEMU_VERSION_DATA.replace(b"1048576", b"4      "))
    client.read(0, 0, 8, expect=errno.EINVAL)
    go(client, S.STOP_COPY)
    data = client.call(Command.MIG_DATA_READ, MigData(argsz=72, size=4).build()).payload
    assert data[MigData.SIZE :] == b"stat"
    client.close()
