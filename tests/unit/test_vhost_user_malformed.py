# SPDX-License-Identifier: Apache-2.0
"""Malformed messages: each is refused, leaks no descriptor, and changes no state.

Every case is sent twice: with NEED_REPLY (the reply reports failure and the connection stays open),
and without (no reply can report the failure, so the connection is closed).  Afterwards the running
ring still works, or a new connection does.
"""

from __future__ import annotations

import os

import pytest
from tests.fakes.backends import Recorder, backend_thread
from tests.fakes.descriptors import open_fds
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import F_LOG_ALL, F_PROTOCOL, Frontend, R
from tests.fakes.memory import make_memory, memfd

import virtio_formats.vhost_user as vu
from virtio_formats.vhost_user import ProtocolFeature as P

MIB = 1 << 20
TOP = 1 << 64


@pytest.fixture
def backend(tmp_path):
    with backend_thread(EchoDevice(), path=tmp_path / "s", events=Recorder()) as backend:
        yield backend


@pytest.fixture
def running(backend, tmp_path):
    """Connect a front-end with two regions of memory and ring 0 running."""
    with Frontend.connect(tmp_path / "s", make_memory((0, MIB), (4 * MIB, MIB))) as frontend:
        frontend.up(0)
        yield frontend


def slot(guest, size, user, offset=0):
    return vu.VhostUserMemRegMsg(
        padding=0, guest_address=guest, size=size, user_address=user, mmap_offset=offset
    ).build()


def table(*regions):
    return vu.VhostUserMemory.of(
        [
            vu.VhostUserMemoryRegion(guest_address=g, size=s, user_address=u, mmap_offset=o)
            for g, s, u, o in regions
        ]
    ).build()


def state(index, num=0):
    return vu.VhostVringState(index=index, num=num).build()


def u64(value):
    return vu.VhostUserU64(u64=value).build()


def addr(index, desc=0, used=0, avail=0, flags=0):
    return vu.VhostVringAddr(
        index=index, flags=flags, descriptor=desc, used=used, available=avail, log=0
    ).build()


def log(size, offset=0):
    return vu.VhostUserLog(mmap_size=size, mmap_offset=offset).build()


def inflight(queues, size, mmap_size, offset=0):
    return vu.VhostUserInflight(
        mmap_size=mmap_size, mmap_offset=offset, num_queues=queues, queue_size=size
    ).build()


FREE = 16 * MIB  # a guest and user address outside of all regions
IN = 1 << 46  # the user address of guest address 0

# name: (request, payload, sizes of memfds to send along)
CASES = {
    "features that were never offered": (R.SET_FEATURES, u64(1 << 63 | F_PROTOCOL), []),
    "features changed while a ring runs": (R.SET_FEATURES, u64(F_PROTOCOL), []),
    "protocol features that were never offered": (
        R.SET_PROTOCOL_FEATURES, u64(int(P.XEN_MMAP | P.REPLY_ACK)), []),
    "in-band notifications": (R.SET_PROTOCOL_FEATURES, u64(1 << 14 | 1 << 3 | 1 << 5), []),
    "unknown protocol feature bit": (R.SET_PROTOCOL_FEATURES, u64(1 << 40 | 8), []),
    "GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD": (
        R.SET_PROTOCOL_FEATURES, u64(int(P.GET_VRING_BASE_INFLIGHT | P.REPLY_ACK)), []),
    "ring index out of range: NUM": (R.SET_VRING_NUM, state(3, 16), []),
    "ring index out of range: BASE": (R.SET_VRING_BASE, state(0xFFFFFFFF), []),
    "ring index out of range: ENABLE": (R.SET_VRING_ENABLE, state(256, 1), []),
    "ring index out of range: ADDR": (R.SET_VRING_ADDR, addr(3, IN, IN, IN), []),
    "ring index out of range: KICK": (R.SET_VRING_KICK, u64(0x103), []),
    "ring index out of range: CALL with descriptor": (R.SET_VRING_CALL, u64(255), [8]),
    "queue size 0": (R.SET_VRING_NUM, state(1, 0), []),
    "queue size above the device's": (R.SET_VRING_NUM, state(1, 2048), []),
    "queue size 65536": (R.SET_VRING_NUM, state(1, 65536), []),
    "split queue size not a power of two": (R.SET_VRING_NUM, state(1, 12), []),
    "queue size of a started ring": (R.SET_VRING_NUM, state(0, 8), []),
    "base of a started ring": (R.SET_VRING_BASE, state(0, 8), []),
    "split base above 16 bits": (R.SET_VRING_BASE, state(1, 0x10000), []),
    "enable with 2": (R.SET_VRING_ENABLE, state(0, 2), []),
    "ring address outside memory": (R.SET_VRING_ADDR, addr(1, FREE, IN, IN), []),
    "ring address at the end of the address space": (
        R.SET_VRING_ADDR, addr(1, IN, TOP - 1, IN), []),
    "ring address in the hole between regions": (
        R.SET_VRING_ADDR, addr(1, IN, IN, IN + 2 * MIB), []),
    "other addresses for a started ring": (R.SET_VRING_ADDR, addr(0, IN, IN, IN), []),
    "kick without descriptor or flag": (R.SET_VRING_KICK, u64(1), []),
    "kick with descriptor and flag": (R.SET_VRING_KICK, u64(0x101), [8]),
    "call with two descriptors": (R.SET_VRING_CALL, u64(1), [8, 8]),
    "err with unknown flags": (R.SET_VRING_ERR, u64(0x1001), [8]),
    "kick that is a file": (R.SET_VRING_KICK, u64(1), [8]),
    "call that is a file": (R.SET_VRING_CALL, u64(0), [8]),
    "log event that is a file": (R.SET_LOG_FD, b"", [8]),
    "back-end channel that is a file": (R.SET_BACKEND_REQ_FD, b"", [8]),
    "back-end channel without descriptor": (R.SET_BACKEND_REQ_FD, b"", []),
    "table with fewer descriptors than regions": (
        R.SET_MEM_TABLE, table((0, MIB, IN, 0), (MIB, MIB, IN + MIB, 0)), [MIB]),
    "table with more descriptors than regions": (
        R.SET_MEM_TABLE, table((0, MIB, IN, 0)), [MIB, MIB]),
    "table with overlapping guest addresses": (
        R.SET_MEM_TABLE, table((0, MIB, IN, 0), (4096, MIB, IN + MIB, 0)), [MIB, MIB]),
    "table with overlapping user addresses": (
        R.SET_MEM_TABLE, table((0, MIB, IN, 0), (MIB, MIB, IN + 4096, 0)), [MIB, MIB]),
    "table whose second region is not in its file": (
        R.SET_MEM_TABLE, table((0, MIB, IN, 0), (MIB, MIB, IN + MIB, 4096)), [MIB, MIB]),
    "region twice": (R.ADD_MEM_REG, slot(0, MIB, IN), [MIB]),
    "region overlapping another": (R.ADD_MEM_REG, slot(MIB - 4096, MIB, FREE), [MIB]),
    "region overlapping in user addresses": (R.ADD_MEM_REG, slot(FREE, MIB, IN + 4096), [MIB]),
    "region of size 0": (R.ADD_MEM_REG, slot(FREE, 0, FREE), [MIB]),
    "region of no whole pages": (R.ADD_MEM_REG, slot(FREE, 4097, FREE), [MIB]),
    "region that wraps around": (R.ADD_MEM_REG, slot(TOP - MIB, 2 * MIB, FREE), [2 * MIB]),
    "region larger than its file": (R.ADD_MEM_REG, slot(FREE, 2 * MIB, FREE), [MIB]),
    "region with an offset past its file": (R.ADD_MEM_REG, slot(FREE, MIB, FREE, MIB), [MIB]),
    "region with an offset that overflows": (
        R.ADD_MEM_REG, slot(FREE, MIB, FREE, TOP - 4096), [MIB]),
    "region of 2^63 bytes": (R.ADD_MEM_REG, slot(FREE, 1 << 63, FREE), [MIB]),
    "region without descriptor": (R.ADD_MEM_REG, slot(FREE, MIB, FREE), []),
    "region with two descriptors": (R.ADD_MEM_REG, slot(FREE, MIB, FREE), [MIB, MIB]),
    "removing a region that is not there": (R.REM_MEM_REG, slot(FREE, MIB, FREE), []),
    "removing a part of a region": (R.REM_MEM_REG, slot(0, 4096, IN), []),
    "removing with a wrong user address": (R.REM_MEM_REG, slot(0, MIB, IN + 4096), [MIB]),
    "removing with two descriptors": (R.REM_MEM_REG, slot(0, MIB, IN), [8, 8]),
    "log of size 0": (R.SET_LOG_BASE, log(0), [MIB]),
    "log past its file": (R.SET_LOG_BASE, log(MIB, 4096), [MIB]),
    "log whose offset and size overflow": (R.SET_LOG_BASE, log(4096, TOP - 4096), [MIB]),
    "log smaller than the guest": (R.SET_LOG_BASE, log(8), [MIB]),
    "log without descriptor": (R.SET_LOG_BASE, log(4096), []),
    "in-flight area for rings that run": (R.SET_INFLIGHT_FD, inflight(3, 16, MIB), [MIB]),
    "status above 8 bits": (R.SET_STATUS, u64(0x100), []),
    "configuration with a size that is not sent": (
        R.SET_CONFIG, (0).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(4 + 16), []),
    "configuration beyond 256 bytes": (
        R.SET_CONFIG, vu.VhostUserConfig(offset=250, size=16, flags=0, region=bytes(16)).build(),
        []),
    "configuration with unknown flags": (
        R.SET_CONFIG, vu.VhostUserConfig(offset=0, size=4, flags=9, region=bytes(4)).build(), []),
    "IOTLB message without an IOMMU": (R.IOTLB_MSG, bytes(32), []),
    "fake RARP for a balloon": (R.SEND_RARP, u64(1), []),
    "MTU for a balloon": (R.NET_SET_MTU, u64(1500), []),
    "ring endianness": (R.SET_VRING_ENDIAN, state(0, 1), []),
    "post-copy": (R.POSTCOPY_ADVISE, b"", []),
    "in-band kick": (R.VRING_KICK, state(0), []),
    "shared object": (R.GET_SHARED_OBJECT, bytes(16), []),
    "shared memory regions": (R.GET_SHMEM_CONFIG, b"", []),
    "GPU socket": (R.GPU_SET_SOCKET, b"", [8]),
    "crypto session": (R.CLOSE_CRYPTO_SESSION, u64(1), []),
}  # fmt: skip

OWN_REPLY = {R.IOTLB_MSG}
"""Requests that get a failure reply even without NEED_REPLY."""
NO_FAILURE = {R.GET_SHARED_OBJECT, R.GET_SHMEM_CONFIG}
"""Requests whose reply cannot express a failure: the connection closes even with NEED_REPLY."""


def still_works(frontend):
    ring = frontend.rings[0]
    ident = ring.submit(b"still here", 16)
    ring.kick()
    assert ring.collect(1) == [(ident, 10)]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[0] not in NO_FAILURE])
def test_refused_with_an_answer(name, running, backend, caplog):
    request, payload, sizes = CASES[name]
    still_works(running)
    before, status = open_fds(), backend.status()
    fds = [memfd(size) for size in sizes]
    assert running.ack(request, payload, fds) != 0
    for fd in fds:
        os.close(fd)
    assert open_fds() == before, "descriptors leaked"
    after = backend.status()
    assert (after.features, after.regions) == (status.features, status.regions)
    assert [q.state for q in after.queues] == [q.state for q in status.queues]
    still_works(running)
    assert "Traceback" not in caplog.text
    assert all(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[0] not in OWN_REPLY])
def test_closed_where_no_answer_is_due(name, running, backend, tmp_path, caplog):
    request, payload, sizes = CASES[name]
    fds = [memfd(size) for size in sizes]
    running.send(request, payload, fds)
    running.expect_close()
    for fd in fds:
        os.close(fd)
    with Frontend.connect(tmp_path / "s") as again:
        again.up(0)
        still_works(again)
    assert "Traceback" not in caplog.text
    assert [r.levelname for r in caplog.records] == ["ERROR"], "one line says why"
    assert backend.server.events.told[1][0] == "disconnected"
    assert backend.server.events.told[1][1]


@pytest.mark.parametrize("name", ["table whose second region is not in its file", "region twice"])
def test_descriptors_after_a_connection_that_ended_badly(name, tmp_path):
    """A back-end that ends closes every descriptor, both refused and accepted ones."""
    memory = make_memory((0, MIB), (4 * MIB, MIB))
    before = open_fds()
    with (
        backend_thread(EchoDevice(), path=tmp_path / "s"),
        Frontend.connect(tmp_path / "s", memory) as frontend,
    ):
        frontend.up(0, 1)
        frontend.open_channel()
        request, payload, sizes = CASES[name]
        fds = [memfd(size) for size in sizes]
        frontend.send(request, payload, fds)
        frontend.expect_close()
        for fd in fds:
            os.close(fd)
    assert open_fds() == before


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:guest" in line for line in maps)


def test_repeated_messages_leak_nothing(running):
    """Replace regions, ring sizes, descriptors and logs 40 times; nothing may leak."""
    log_file = memfd(MIB)
    baseline = None
    for turn in range(40):
        event = os.eventfd(0)
        for request in (R.SET_VRING_CALL, R.SET_VRING_ERR):
            running.ok(request, u64(1), [event])
        running.ok(R.SET_LOG_FD, b"", [event])
        os.close(event)
        running.ok(R.SET_VRING_NUM, state(1, 16))
        assert running.get_u64(R.SET_LOG_BASE, log(4096), [log_file]) == 0
        running.ok(R.REM_MEM_REG, running.slot(1))
        running.ok(R.ADD_MEM_REG, running.slot(1), [running.memory.regions[1].fd])
        channel = running.channel
        running.open_channel()
        if channel is not None:
            channel.close()
        if turn == 5:
            baseline = open_fds(), mappings()
    assert (open_fds(), mappings()) == baseline
    os.close(log_file)
    still_works(running)


def test_a_ring_inside_a_region_that_is_removed_waits_for_it(running, backend):
    """QEMU changes a region by removing and adding it while rings run."""
    running.arena.next = 4 * MIB
    running.arena.end = 5 * MIB
    ring = running.new_ring(1)
    running.ok(R.REM_MEM_REG, running.slot(1))
    assert backend.status().queues[1].state == "disabled"
    ident = ring.submit(b"meanwhile", 16)
    ring.kick()
    assert backend.status().queues[0].state == "running"
    running.ok(R.ADD_MEM_REG, running.slot(1), [running.memory.regions[1].fd])
    assert ring.collect(1) == [(ident, 9)]
    running.ok(R.REM_MEM_REG, running.slot(1))
    assert running.stop_ring(ring) == 1, "a ring without its memory can still be stopped"
    running.arena.next, running.arena.end = 0x40000, MIB
    still_works(running)


def test_a_ring_that_begins_outside_memory_is_broken(running, backend):
    running.arena.next = 4 * MIB
    running.arena.end = 5 * MIB
    ring = running.make_ring(1)
    message = running.addr_message(ring)
    running.ok(R.SET_VRING_NUM, state(1, 16))
    running.ok(R.SET_VRING_ADDR, message)
    running.ok(R.REM_MEM_REG, running.slot(1))
    running.ok(R.SET_VRING_ERR, u64(1), [ring.err_fd])
    running.ok(R.SET_VRING_ENABLE, state(1, 1))
    running.ok(R.SET_VRING_KICK, u64(1), [ring.kick_fd])
    assert backend.status().queues[1].state == "broken"
    assert os.eventfd_read(ring.err_fd) >= 1


def test_one_region_more_than_there_are_slots(backend, tmp_path):
    with Frontend.connect(tmp_path / "s") as frontend:
        frontend.negotiate()
        slots = frontend.get_u64(R.GET_MAX_MEM_SLOTS)
        backend.on_loop(fill_slots, backend, slots)
        fd = memfd(MIB)
        assert frontend.ack(R.ADD_MEM_REG, slot(FREE, 4096, FREE), [fd]) == 1
        os.close(fd)


def fill_slots(backend, count):
    """Fill the memory table with *count* regions that have no descriptor."""
    from vballoon.memory import GuestMemory, MemoryRegion

    backend.server.backend.table.memory = GuestMemory(
        MemoryRegion(guest_phys_addr=1 << 40 | i * 4096, size=4096, userspace_addr=i * 4096)
        for i in range(count)
    )


def test_log_all_may_be_toggled_while_rings_run(running):
    """Starting a migration must not stop the device, nor may SET_FEATURES without bit 30."""
    for features in (F_LOG_ALL | running.features, running.features) * 3:
        running.ok(R.SET_FEATURES, u64(features))
        still_works(running)


def test_packed_base_outside_the_ring_stops_the_ring(tmp_path):
    from vballoon.vhost_user import DEFAULT_RING_FEATURES

    with (
        backend_thread(
            EchoDevice(), path=tmp_path / "s", ring_features=DEFAULT_RING_FEATURES | 1 << 34
        ) as backend,
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        frontend.negotiate()
        frontend.share_memory()
        frontend.new_ring(0, base=0x8010_8010)
        assert backend.status().queues[0].broken == "vring-base"


def test_an_area_for_fewer_descriptors_than_the_ring_has_stops_the_ring(backend, tmp_path):
    with Frontend.connect(tmp_path / "s") as frontend:
        frontend.negotiate()
        frontend.share_memory()
        told = frontend.call(R.GET_INFLIGHT_FD, inflight(3, 8, 0))
        (fd,) = frontend.reply_fds
        frontend.ok(R.SET_INFLIGHT_FD, told, [fd])
        os.close(fd)
        frontend.new_ring(0, 16)
        frontend.new_ring(1, 8)
        assert [q.broken for q in backend.status().queues] == ["inflight-area", None, None]
