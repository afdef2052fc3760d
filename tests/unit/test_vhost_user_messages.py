# SPDX-License-Identifier: Apache-2.0
"""Every message against a running back-end over a real socket; the test's name says which.

The last test of this file checks that no message is without a test.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from tests.fakes.backends import Recorder, backend_thread
from tests.fakes.descriptors import open_fds
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import F_LOG_ALL, F_PROTOCOL, Frontend, R
from tests.fakes.memory import make_memory, memfd

import virtio_formats.vhost_user as vu
from vballoon.vhost_user import DEFAULT_RING_FEATURES, PROTOCOL_FEATURES
from virtio_formats.vhost_user import ProtocolFeature as P

MIB = 1 << 20


@pytest.fixture
def device():
    return EchoDevice()


@pytest.fixture
def events():
    return Recorder()


@pytest.fixture
def backend(device, events, tmp_path):
    with backend_thread(device, path=tmp_path / "s", events=events) as backend:
        yield backend


@pytest.fixture
def frontend(backend, tmp_path):
    """Connect; check at the end that the back-end is alive and all descriptors are closed."""
    with Frontend.connect(tmp_path / "s") as frontend:
        yield frontend
    with Frontend.connect(tmp_path / "s") as again:
        assert again.get_u64(R.GET_FEATURES)


def test_get_features(frontend):
    offered = frontend.get_u64(R.GET_FEATURES)
    assert offered == DEFAULT_RING_FEATURES | 3 | F_PROTOCOL | F_LOG_ALL


def test_get_protocol_features_offers_what_is_served_and_nothing_else(frontend):
    offered = frontend.get_u64(R.GET_PROTOCOL_FEATURES)
    assert offered == int(PROTOCOL_FEATURES)
    never = P.INBAND_NOTIFICATIONS | P.XEN_MMAP | P.GPA_ADDRESSES | P.SHMEM_MAP | P.PAGEFAULT
    assert not offered & never


def test_set_features_and_set_protocol_features(frontend, backend):
    frontend.negotiate(wanted=1 | F_PROTOCOL | 1 << 32, protocol=int(P.REPLY_ACK | P.MQ))
    status = backend.status()
    assert status.features == ["bit 0", "VIRTIO_F_VERSION_1"]
    assert status.protocol_features == ["MQ", "REPLY_ACK"]


def test_set_owner_and_reset_owner(frontend, device):
    (ring,) = frontend.up()
    frontend.ok(R.SET_OWNER)
    frontend.ok(R.RESET_OWNER)  # disables the rings, and no more than that
    ring.submit(b"x")
    ring.kick()
    assert ring.called(0.05) == 0
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    assert len(ring.collect(1)) == 1


def test_get_queue_num(frontend):
    assert frontend.get_u64(R.GET_QUEUE_NUM) == EchoDevice.num_queues


def test_get_max_mem_slots(frontend):
    frontend.negotiate()
    assert frontend.get_u64(R.GET_MAX_MEM_SLOTS) == 256


def test_set_mem_table(frontend, backend, device):
    frontend.memory = make_memory((0, MIB), (4 * MIB, MIB))
    frontend.negotiate(protocol=int(P.REPLY_ACK))
    frontend.share_memory()
    assert [r.guest_phys_addr for r in backend.status().regions] == [0, 4 * MIB]
    table = vu.VhostUserMemory.of([frontend.region(1)])
    frontend.ok(R.SET_MEM_TABLE, table.build(), [frontend.memory.regions[1].fd])
    assert [r.guest_phys_addr for r in backend.status().regions] == [4 * MIB]
    frontend.ok(R.SET_MEM_TABLE, vu.VhostUserMemory.of([]).build())
    assert backend.status().regions == []
    assert [line for line in device.log if "memory" in line] == [
        "memory_changed 2",
        "memory_changed 1",
        "memory_changed 0",
    ]


def test_add_mem_reg_and_rem_mem_reg(frontend, backend):
    frontend.memory = make_memory((0, MIB), (4 * MIB, MIB), (8 * MIB, MIB))
    frontend.negotiate()
    frontend.share_memory()
    before = open_fds()
    frontend.ok(R.REM_MEM_REG, frontend.slot(1))
    assert [r.guest_phys_addr for r in backend.status().regions] == [0, 8 * MIB]
    each = before - open_fds()
    assert each >= 1, "the region's descriptor is still open"
    frontend.ok(R.REM_MEM_REG, frontend.slot(2), [frontend.memory.regions[2].fd])
    assert open_fds() == before - 2 * each, "the descriptor sent with REM_MEM_REG is still open"
    frontend.ok(R.ADD_MEM_REG, frontend.slot(1), [frontend.memory.regions[1].fd])
    assert [r.guest_phys_addr for r in backend.status().regions] == [0, 4 * MIB]


def test_rem_mem_reg_does_not_look_at_the_offset(frontend, backend):
    frontend.negotiate()
    frontend.share_memory()
    slot = vu.VhostUserMemRegMsg.parse(frontend.slot())
    slot.mmap_offset = 0x123000
    frontend.ok(R.REM_MEM_REG, slot.build())
    assert backend.status().regions == []


def test_set_vring_num_addr_base_kick_call_enable(frontend, backend):
    """The whole life of a ring, one message at a time, and what the status says to it."""
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring(1, 32)
    frontend.start_ring(ring, enable=False)
    queue = backend.status().queues[1]
    assert (queue.state, queue.size) == ("disabled", 32)
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(1, 1))
    assert backend.status().queues[1].state == "running"
    ring.submit(b"ping", 8)
    ring.kick()
    assert ring.called(5) == 1
    assert ring.collect(1) == [(0, 4)]
    assert frontend.stop_ring(ring) == 1
    assert backend.status().queues[1].state == "stopped"


def test_set_vring_err_is_signalled_when_the_ring_breaks(frontend, backend, events):
    (ring,) = frontend.up()
    ring.driver.avail_ring[0] = 999
    ring.driver.avail[1] = 1
    ring.kick()
    assert os.eventfd_read(wait(ring.err_fd)) == 1
    assert ("broken", 0, "head-range") in events.told
    queue = backend.status().queues[0]
    assert (queue.state, queue.broken) == ("broken", "head-range")
    other = frontend.new_ring(1)
    other.submit(b"the others go on", 16)
    other.kick()
    assert other.collect(1) == [(0, 16)]


def test_set_vring_err_tells_of_a_ring_that_broke_before(frontend):
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring()
    late, ring.err_fd = ring.err_fd, -1
    ring.driver.avail_ring[0] = 999
    ring.driver.avail[1] = 1
    frontend.start_ring(ring)
    frontend.get_u64(R.GET_FEATURES)  # the ring has been looked at by now
    frontend.ok(R.SET_VRING_ERR, frontend.u64(0), [late])
    assert os.eventfd_read(wait(late)) == 1
    ring.err_fd = late


def wait(fd, timeout=5.0):
    import select

    assert select.select([fd], [], [], timeout)[0], "not signalled"
    return fd


def test_set_vring_call_can_be_replaced_and_taken_away(frontend):
    (ring,) = frontend.up()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    frontend.ok(R.SET_VRING_CALL, frontend.u64(0), [other])
    ring.submit(b"x")
    ring.kick()
    ring.collect(1)
    assert os.eventfd_read(wait(other)) == 1
    assert ring.called() == 0
    frontend.ok(R.SET_VRING_CALL, frontend.u64(0x100))
    ring.driver.interrupts(True)
    ring.submit(b"y")
    ring.kick()
    ring.collect(1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_set_vring_kick_without_a_descriptor_is_polled(frontend):
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring()
    frontend.ok(R.SET_VRING_NUM, frontend.state(0, 16))
    frontend.ok(R.SET_VRING_ADDR, frontend.addr_message(ring))
    frontend.ok(R.SET_VRING_KICK, frontend.u64(0x100))
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    ring.submit(b"nobody kicks", 16)
    assert ring.collect(1) == [(0, 12)]


def test_get_vring_base_of_a_ring_that_never_started(frontend):
    frontend.negotiate()
    frontend.ok(R.SET_VRING_BASE, frontend.state(2, 77))
    reply = frontend.call(R.GET_VRING_BASE, frontend.state(2, 0))
    assert vu.VhostVringState.parse(reply).num == 77


def config(offset, size, flags=0, data=None):
    region = bytes(size) if data is None else data
    return vu.VhostUserConfig(offset=offset, size=size, flags=flags, region=region).build()


def test_get_config(frontend):
    frontend.negotiate()
    whole = frontend.call(R.GET_CONFIG, config(0, 16))
    assert whole == config(0, 16, data=bytes(range(16)))
    part = frontend.call(R.GET_CONFIG, config(4, 4))
    assert part == config(4, 4, data=bytes(range(4, 8)))
    beyond = frontend.call(R.GET_CONFIG, config(12, 12))
    assert beyond == config(12, 12, data=bytes(range(12, 16)) + bytes(8))


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (256, 1), (0, 257), (0xFFFFFFFF, 16)])
def test_get_config_out_of_range_is_answered_with_nothing(frontend, offset, size):
    frontend.negotiate()
    assert frontend.call(R.GET_CONFIG, config(offset, size)) == b""


def test_set_config_of_the_whole_block_is_never_refused(frontend, device):
    """QEMU echoes the block, read-only fields included: only the writable ones change."""
    frontend.negotiate()
    frontend.ok(R.SET_CONFIG, config(0, 16, data=b"\xaa" * 16))
    expected = bytes(range(4)) + b"\xaa" * 4 + bytes(range(8, 16))
    assert frontend.call(R.GET_CONFIG, config(0, 16))[12:] == expected
    frontend.ok(R.SET_CONFIG, config(0, 24, data=b"\xbb" * 24))  # config_size larger than ours
    frontend.ok(R.SET_CONFIG, config(0, 16, flags=1, data=bytes(16)))
    assert device.log.count("write_config 0 16") == 3
    assert frontend.ack(R.SET_CONFIG, config(0, 16, flags=2)) == 1


def test_set_backend_req_fd_and_config_change(frontend, backend, device):
    channel = frontend_with_channel(frontend)
    backend.on_loop(device.transport.config_changed)
    header = vu.VhostUserHeader.parse(channel.recv(12))
    assert (header.request, header.flags, header.size) == (2, 1, 0)


def frontend_with_channel(frontend) -> socket.socket:
    frontend.up()
    return frontend.open_channel()


def test_a_suspended_device_sends_its_config_change_when_it_runs(frontend, backend, device):
    """ "Suspended device state": not send any messages to the front-end."""
    frontend.negotiate()
    frontend.share_memory()
    channel = frontend.open_channel()
    backend.on_loop(device.transport.config_changed)
    backend.on_loop(device.transport.config_changed)
    channel.settimeout(0.05)
    with pytest.raises(TimeoutError):
        channel.recv(12)
    frontend.new_ring()
    channel.settimeout(5)
    assert vu.VhostUserHeader.parse(channel.recv(100)).request == 2, "exactly one message"


def test_a_back_end_channel_that_talks_nonsense_is_closed_and_nothing_else(frontend):
    channel = frontend_with_channel(frontend)
    channel.send(bytes(20))
    assert channel.recv(1) == b""
    assert frontend.get_u64(R.GET_FEATURES)


def test_set_status_and_get_status(frontend):
    frontend.negotiate()
    assert frontend.get_u64(R.GET_STATUS) == 0
    frontend.ok(R.SET_STATUS, frontend.u64(3))
    assert frontend.get_u64(R.GET_STATUS) == 3
    assert frontend.ack(R.SET_FEATURES, frontend.u64(1 << 63)) == 1
    frontend.ok(R.SET_STATUS, frontend.u64(11))
    assert frontend.get_u64(R.GET_STATUS) == 3, "FEATURES_OK for features that were refused"
    frontend.ok(R.SET_FEATURES, frontend.u64(frontend.features))
    frontend.ok(R.SET_STATUS, frontend.u64(11))
    assert frontend.get_u64(R.GET_STATUS) == 11


def test_set_status_nothing_is_served_before_driver_ok(frontend):
    frontend.negotiate()
    frontend.share_memory()
    frontend.ok(R.SET_STATUS, frontend.u64(11))
    ring = frontend.new_ring()
    ring.submit(b"x")
    ring.kick()
    assert ring.called(0.05) == 0
    frontend.ok(R.SET_STATUS, frontend.u64(15))
    assert len(ring.collect(1)) == 1


def test_set_status_zero_stops_the_rings(frontend, backend):
    frontend.up(0, 1)
    frontend.ok(R.SET_STATUS, frontend.u64(0))
    assert [q.state for q in backend.status().queues] == ["stopped"] * 3


def test_set_status_features_ok_alone_as_qemu_sends_it(frontend):
    """QEMU 11.1's generic device sends FEATURES_OK and never DRIVER or DRIVER_OK."""
    frontend.negotiate()
    frontend.ok(R.SET_STATUS, frontend.u64(8))
    frontend.share_memory()
    ring = frontend.new_ring()
    ring.submit(b"x")
    ring.kick()
    assert len(ring.collect(1)) == 1


def test_reset_device(frontend, backend, device):
    frontend.up(0, 1)
    device.log.clear()
    frontend.ok(R.RESET_DEVICE)
    assert device.log == ["stop", "reset"]
    status = backend.status()
    assert [q.state for q in status.queues] == ["stopped"] * 3
    assert status.features == []
    assert frontend.get_u64(R.GET_STATUS) == 0
    assert len(status.regions) == 1, "the connection and its memory stay"
    frontend.ok(R.SET_FEATURES, frontend.u64(frontend.features))
    frontend.rings.pop(0).close()
    ring = frontend.new_ring(0)
    frontend.status_ok()
    ring.submit(b"again", 8)
    ring.kick()
    assert ring.collect(1) == [(0, 5)]


def test_set_log_base_and_set_log_fd(frontend):
    (ring,) = frontend.up()
    size = 16 * MIB // 4096 // 8
    log = memfd(4096 + size)
    log_event = os.eventfd(0, os.EFD_NONBLOCK)
    description = vu.VhostUserLog(mmap_size=size, mmap_offset=4096).build()
    reply = frontend.call(R.SET_LOG_BASE, description, [log])
    assert vu.VhostUserU64.parse(reply).u64 == 0
    frontend.ok(R.SET_LOG_FD, b"", [log_event])
    room = ring.driver.arena.next
    ring.submit(b"not logged yet", 64)
    ring.kick()
    ring.collect(1)
    assert not any(os.pread(log, size, 4096)), "logged before LOG_ALL was negotiated"
    frontend.ok(R.SET_FEATURES, frontend.u64(frontend.features | F_LOG_ALL))
    ring_log = 0x555000
    frontend.ok(R.SET_VRING_ADDR, frontend.addr_message(ring, log=ring_log))
    ring.driver.arena.take(16 * 4096 - ring.driver.arena.next % (8 * 4096))
    ring.submit(b"logged", 64)
    room = ring.driver.arena.next - 64
    ring.kick()
    ring.collect(1)
    dirty = np.unpackbits(np.frombuffer(os.pread(log, size, 4096), np.uint8), bitorder="little")
    assert dirty[room // 4096], "the written buffer"
    assert dirty[ring_log // 4096], "the used ring, at the address that SET_VRING_ADDR gave"
    assert dirty.sum() <= 16, "and no more than those pages' groups of eight"
    assert os.eventfd_read(wait(log_event)) >= 1
    frontend.ok(R.SET_FEATURES, frontend.u64(frontend.features))
    os.pwrite(log, bytes(size), 4096)
    ring.submit(b"logging has ended", 64)
    ring.kick()
    ring.collect(1)
    assert not any(os.pread(log, size, 4096))
    os.close(log)
    os.close(log_event)


def test_set_log_base_that_does_not_cover_the_guest_ends_the_connection(frontend):
    frontend.up()
    log = memfd(4096)
    frontend.send(R.SET_LOG_BASE, vu.VhostUserLog(mmap_size=8, mmap_offset=0).build(), [log])
    frontend.expect_close()
    os.close(log)


def inflight(num_queues=3, queue_size=16, size=0, offset=0):
    return vu.VhostUserInflight(
        mmap_size=size, mmap_offset=offset, num_queues=num_queues, queue_size=queue_size
    )


def test_get_inflight_fd_and_set_inflight_fd(frontend):
    frontend.negotiate()
    reply = frontend.call(R.GET_INFLIGHT_FD, inflight().build())
    area = vu.VhostUserInflight.parse(reply)
    assert area.mmap_size >= 3 * vu.queue_region_size(16, packed=False)
    (fd,) = frontend.reply_fds
    assert os.fstat(fd).st_size >= area.mmap_size
    assert not any(os.pread(fd, area.mmap_size, area.mmap_offset))
    frontend.ok(R.SET_INFLIGHT_FD, area.build(), [fd])
    os.close(fd)


@pytest.mark.parametrize(
    "bad", [inflight(0), inflight(4), inflight(0xFFFF), inflight(3, 0), inflight(3, 40000)]
)
def test_get_inflight_fd_for_nonsense_gives_no_area(frontend, bad):
    frontend.negotiate()
    reply = vu.VhostUserInflight.parse(frontend.call(R.GET_INFLIGHT_FD, bad.build()))
    assert reply.mmap_size == 0
    assert frontend.reply_fds == []


def transfer(direction, phase=0):
    return vu.VhostUserTransferDeviceState(direction=direction, phase=phase).build()


def begin_transfer(frontend, direction, fd):
    told = frontend.get_u64(R.SET_DEVICE_STATE_FD, transfer(direction), [fd])
    os.close(fd)
    return told


def test_set_device_state_fd_and_check_device_state_save(frontend, device):
    device.state = os.urandom(300_000)  # more than a pipe holds
    frontend.negotiate()
    reader, writer = os.pipe()
    assert begin_transfer(frontend, 0, writer) == 0x100
    frontend.send(R.CHECK_DEVICE_STATE)  # before a byte was read: the answer has to wait
    got = b""
    while part := os.read(reader, 65536):
        got += part
    assert got == device.state
    assert struct.unpack("=Q", frontend.receive(R.CHECK_DEVICE_STATE)) == (0,)
    os.close(reader)


def test_set_device_state_fd_load(frontend, device):
    frontend.negotiate()
    reader, writer = os.pipe()
    assert begin_transfer(frontend, 1, reader) == 0x100
    state = os.urandom(200_000)
    frontend.send(R.CHECK_DEVICE_STATE)
    for at in range(0, len(state), 10_000):
        os.write(writer, state[at : at + 10_000])
    os.close(writer)
    assert struct.unpack("=Q", frontend.receive(R.CHECK_DEVICE_STATE)) == (0,)
    assert device.state == state


def test_set_device_state_fd_also_with_a_regular_file(frontend, device, tmp_path):
    frontend.negotiate()
    path = tmp_path / "state"
    assert begin_transfer(frontend, 0, os.open(path, os.O_RDWR | os.O_CREAT)) == 0x100
    assert frontend.get_u64(R.CHECK_DEVICE_STATE) == 0
    assert path.read_bytes() == device.state
    path.write_bytes(b"from a file")
    assert begin_transfer(frontend, 1, os.open(path, os.O_RDONLY)) == 0x100
    assert frontend.get_u64(R.CHECK_DEVICE_STATE) == 0
    assert device.state == b"from a file"


def test_check_device_state_tells_of_failure(frontend, device):
    frontend.negotiate()
    assert frontend.get_u64(R.CHECK_DEVICE_STATE) == 1, "nothing was transferred"
    reader, writer = os.pipe()
    assert begin_transfer(frontend, 1, reader) == 0x100
    os.write(writer, b"bad state")
    os.close(writer)
    assert frontend.get_u64(R.CHECK_DEVICE_STATE) == 1
    reader, writer = os.pipe()
    os.close(reader)
    device.state = b"x" * 10
    assert begin_transfer(frontend, 0, writer) == 0x100
    assert frontend.get_u64(R.CHECK_DEVICE_STATE) == 1, "nobody read it"


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (1, 7)])
def test_set_device_state_fd_refuses_what_it_does_not_know(frontend, direction, phase):
    frontend.negotiate()
    reader, writer = os.pipe()
    told = frontend.get_u64(R.SET_DEVICE_STATE_FD, transfer(direction, phase), [writer])
    assert told & 0xFF
    assert told & 0x100
    os.close(writer)
    assert os.read(reader, 1) == b"", "the descriptor was kept"
    os.close(reader)


def test_set_device_state_fd_of_a_running_device_is_refused(frontend):
    frontend.up()
    reader, writer = os.pipe()
    assert begin_transfer(frontend, 0, writer) & 0xFF
    os.close(reader)


def test_every_message_that_is_served_is_in_this_file(backend, frontend):
    assert frontend.get_u64(R.GET_FEATURES)
    served = set(backend.server.backend.session._handlers)
    text = Path(__file__).read_text()
    assert [
        r.name
        for r in served
        if not re.search(rf"R\.{r.name}\b", text)
        and not hasattr(Frontend, r.name)
        and r.name.lower() not in text
    ] == []
    unserved = set(R) - served
    assert {r.name for r in unserved} == {
        "SEND_RARP", "NET_SET_MTU", "IOTLB_MSG", "SET_VRING_ENDIAN", "CREATE_CRYPTO_SESSION",
        "CLOSE_CRYPTO_SESSION", "POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END",
        "GPU_SET_SOCKET", "VRING_KICK", "GET_SHARED_OBJECT", "GET_SHMEM_CONFIG",
    }  # fmt: skip
