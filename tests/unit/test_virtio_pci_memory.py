# SPDX-License-Identifier: Apache-2.0
"""``vballoon.virtio_pci.memory``: guest memory that comes, goes and is not what it seems; clients.

Virtio 1.4, *Virtio Over PCI Bus*, *Device Reset*, *Virtqueue Reset*.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fakes.descriptors import open_fds
from tests.fakes.echo import Echo
from tests.fakes.vfio_client import FakeClient, Ram
from tests.fakes.virtio_pci import MODES, RAM_BASE, RAM_SIZE, Guest, end, make, send

from vballoon.errors import MemoryFault
from vballoon.virtio_pci import VirtioPciFunction
from virtio_formats.vfio_user import Command, DmaMap
from virtio_formats.virtio import features as f
from virtio_formats.virtio.status import DeviceStatus as S

V1 = f.mask(f.VIRTIO_F_VERSION_1)
RUNNING = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK


@pytest.fixture(params=MODES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Echo, Guest]]:
    before = open_fds()
    echo, guest = make(request.param)
    yield echo, guest
    end(guest)
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def mapped() -> Iterator[tuple[Echo, Guest]]:
    echo, guest = make()
    yield echo, guest
    end(guest)


class TestMemory:
    def test_hot_added_memory_under_running_queues(self, pair: tuple[Echo, Guest]) -> None:
        echo, guest = pair
        guest.start(V1, (0, 1))
        send(guest, 0, b"before")
        send(guest, 1, b"held")
        more = Ram(RAM_BASE + RAM_SIZE, 1 << 20)
        guest.client.map(more)
        assert f"memory {RAM_SIZE + (1 << 20):#x}" in echo.log
        ring = guest.rings[0]
        ring.collect()
        back = ring.buffer(4, writable=True)
        more.write(more.address, b"more")
        ring.add(ring.buffer(4)._replace(addr=more.address), back)
        ring.publish()
        guest.kick(0)
        assert guest.memory.read(back.addr, 4) == b"erom"
        assert guest.rings[1].collect() == [(0, 0)], "what the device held came back"
        guest.client.unmap(more.address, more.size)
        send(guest, 0, b"after")
        assert len(ring.collect()) == 2
        more.close()

    def test_a_region_that_goes_while_it_is_in_use(self, mapped: tuple[Echo, Guest]) -> None:
        _echo, guest = mapped
        guest.start(V1)
        guest.client.unmap(RAM_BASE, RAM_SIZE)
        assert guest.function.memory.size == 0
        send(guest, 0, b"meanwhile")
        with pytest.raises(MemoryFault):
            guest.function.memory.read(RAM_BASE, 1)
        assert not guest.get("device_status") & S.NEEDS_RESET, "the rings wait for their memory"
        assert guest.rings[0].collect() == []
        guest.client.map(guest.ram)  # QEMU changes a region by unmapping it and mapping it again
        assert len(guest.rings[0].collect()) == 1

    def test_a_ring_that_begins_outside_memory(self, mapped: tuple[Echo, Guest]) -> None:
        _echo, guest = mapped
        guest.negotiate(V1)
        guest.set_up(0)
        guest.client.unmap(RAM_BASE, RAM_SIZE)
        guest.set("device_status", RUNNING)
        assert guest.get("device_status") & S.NEEDS_RESET

    def test_pieces_that_come_and_go_at_boot(self, mapped: tuple[Echo, Guest]) -> None:
        echo, guest = mapped
        for number in range(8):
            request = DmaMap(argsz=32, flags=1, offset=0, address=number << 16, size=0x10000)
            guest.client.call(Command.DMA_MAP, request.build(), run=False)
        guest.client.run()
        assert echo.log.count(f"memory {RAM_SIZE + 0x80000:#x}") == 1, "once for all of them"
        for number in range(8):
            guest.client.unmap(number << 16, 0x10000)
        guest.start(V1)
        send(guest, 0, b"ok")
        assert len(guest.rings[0].collect()) == 1

    def test_read_only_regions(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        rom = Ram(0, 0x10000)
        guest.client.map(rom, flags=1)
        guest.start(V1)
        ring = guest.rings[0]
        ring.add(ring.buffer(4), ring.buffer(4, writable=True)._replace(addr=0))
        ring.publish()
        guest.kick(0)
        assert rom.read(0, 4) == bytes(4)
        assert guest.get("device_status") & S.NEEDS_RESET
        rom.close()

    def test_a_file_that_the_guest_does_not_use(self, caplog: pytest.LogCaptureFixture) -> None:
        """share=off: the client sends a descriptor, but the guest's writes are elsewhere."""
        echo = Echo()
        guest = Guest(VirtioPciFunction(echo), mapped=False)
        guest.client.unmap(RAM_BASE, RAM_SIZE)
        guest.client.ram.clear()
        decoy = Ram(RAM_BASE, RAM_SIZE)
        guest.client.map(decoy)
        guest.client.ram[:] = [guest.ram]
        guest.start(V1)
        (answer,) = send(guest, 0, b"private")
        assert guest.memory.read(answer, 7) == b"etavirp"
        assert guest.rings[0].collect() == [(0, 7)]
        assert not any(decoy.read(RAM_BASE, RAM_SIZE)), "written into a file nobody reads"
        assert [r.levelname for r in caplog.records].count("ERROR") == 1
        decoy.close()
        end(guest)

    def test_only_the_first_doorbell_looks_at_the_files(
        self, mapped: tuple[Echo, Guest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, guest = mapped
        guest.start(V1)
        send(guest, 0, b"first")
        looked: list[int] = []
        monkeypatch.setattr(guest.function.client_memory, "_suspect", looked.append)
        send(guest, 0, b"second")
        assert looked == []
        guest.client.map(more := Ram(RAM_BASE + 2 * RAM_SIZE, 0x10000))
        send(guest, 0, b"third")  # the memory has changed: look once more
        assert len(looked) > 0
        guest.client.unmap(more.address, more.size)
        more.close()

    def test_dma_logging_marks_what_the_device_writes(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(V1)
        guest.function.dma.log.start(4096, [])
        guest.function.dma_logging(True)
        (answer,) = send(guest, 0, b"dirty")
        bitmap = guest.function.dma.log.report(RAM_BASE, RAM_SIZE, 4096, 1 << 20)
        dirty = int.from_bytes(bitmap, "little")
        pages = {(a - RAM_BASE) // 4096 for a in (answer, guest.rings[0].addresses.device)}
        assert all(dirty >> page & 1 for page in pages)
        guest.function.stop_logging()
        assert guest.function.memory.dirty_log is None

    def test_dma_logging_of_a_packed_ring(self) -> None:
        """Used descriptors go into the descriptor ring, and the event flags are elsewhere."""
        packed = V1 | f.mask(f.VIRTIO_F_RING_PACKED)
        _, guest = make(ring_features=packed)
        guest.size = 64
        guest.arena.next = RAM_BASE + 4096 - 16 * guest.size  # the ring ends where its page does
        guest.start(packed)
        guest.function.dma.log.start(4096, [])
        guest.function.dma_logging(True)
        guest.arena.next += 4096  # what is written into buffers is in another page
        send(guest, 0, b"dirty")
        at = guest.rings[0].addresses
        marked = {
            addr: int.from_bytes(guest.function.dma.log.report(addr & -4096, 4096, 4096, 64))
            for addr in (at.desc, at.device)
        }
        assert at.desc >> 12 != at.device >> 12
        assert all(marked.values())
        end(guest)


class TestClients:
    def test_a_second_client_finds_the_device_as_it_was(self) -> None:
        """Registers stay, and rings continue at their positions."""
        echo, guest = make()
        guest.start(V1)
        send(guest, 0, b"one")
        guest.client.session.receive_eof()
        guest.client.run()
        assert echo.log[-1] == "detach"
        assert not guest.function.queues
        assert guest.function.memory.size == 0
        client = FakeClient(guest.function)
        client.negotiate()
        guest.client = client
        assert guest.get("device_status") == RUNNING
        client.map(guest.ram)
        client.assign(2, guest.vectors)
        (answer,) = send(guest, 0, b"two")
        assert guest.memory.read(answer, 3) == b"owt"
        assert [length for _, length in guest.rings[0].collect()] == [3, 3]
        end(guest)

    def test_one_that_goes_while_the_device_waits_for_it(self) -> None:
        _, guest = make("messages")
        guest.start(V1)
        guest.client.silent = True
        guest.client.before_dma = guest.client.session.receive_eof
        send(guest, 0, b"gone")
        assert not guest.function.queues
        end(guest)
