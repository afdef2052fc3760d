# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.client``: the asyncio client against a server in the same loop."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from gadget import FAIL, Gadget
from helpers import open_fds

import fdsocket
from vfio_user import Server
from vfio_user.client import Client, CommandError
from vfio_user.ram import Ram
from vfio_user.requests import (
    assign_irqs,
    device_info,
    get_state,
    irq_info,
    read_state,
    region_info,
    region_read,
    region_write,
    reset,
    set_state,
    write_state,
)
from virtio_formats.vfio_user import DeviceState, PciIrq, PciRegion

BASE = 0x10000


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget()
    yield device
    device.close()


def drive(gadget: Gadget, path: Path, test: Callable[[Client], Awaitable[None]]) -> None:
    """Serve *gadget* and run *test* with a client of it."""

    async def main() -> None:
        server = Server(gadget, fdsocket.listen(path))
        serving = asyncio.create_task(server.serve())
        async with await Client.connect(path) as client:
            await test(client)
        server.close()
        await serving

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_registers_interrupts_and_descriptions(gadget: Gadget, tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        assert client.server is not None
        assert client.server.max_msg_fds == 16
        assert (await client.call(device_info())).num_regions == 9
        assert (await client.call(irq_info(PciIrq.MSIX))).count == 2048
        info, _, fds = await client.call(region_info(PciRegion.BAR2))
        assert (info.size, len(fds)) == (0x8000, 1)
        os.close(fds[0])
        client.post(region_write(0, 8, b"posted"))
        assert await client.call(region_read(0, 8, 6)) == b"posted"
        with pytest.raises(CommandError) as refused:
            await client.call(region_write(0, FAIL, b"x"))
        assert refused.value.errno == errno.ENOSPC
        fd = os.eventfd(0)
        await client.call(assign_irqs(PciIrq.MSIX, [fd], start=3))
        gadget.irqs.trigger(PciIrq.MSIX, 3)
        assert os.eventfd_read(fd) == 1
        os.close(fd)
        await client.call(reset())
        assert gadget.log[-1] == ("reset",)

    drive(gadget, tmp_path / "s", test)


@pytest.mark.parametrize("shared", [True, False])
def test_its_memory(gadget: Gadget, tmp_path: Path, shared: bool) -> None:
    """Without a descriptor, the server's messages are answered while a command waits."""

    async def test(client: Client) -> None:
        ram = Ram(BASE, 0x4000)
        ram.write(BASE, b"data")
        await client.map(ram, shared=shared)
        done = asyncio.Event()

        def work() -> None:
            gadget.dma.write(BASE + 8, gadget.dma.read(BASE, 4))
            done.set()

        # The server waits for an answer in its loop, which is ours: so it has its own thread.
        gadget.defer(work)
        await asyncio.wait_for(done.wait(), 10)
        assert ram.read(BASE + 8, 4) == b"data"
        await client.unmap(ram)
        ram.close()

    if shared:
        drive(gadget, tmp_path / "s", test)
    else:
        in_a_thread(gadget, tmp_path / "s")


def in_a_thread(gadget: Gadget, path: Path) -> None:
    """Serve in a loop of its own, which may wait for the client's answers."""
    listener = fdsocket.listen(path)
    servers: list[tuple[Server, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        server = Server(gadget, listener)
        servers.append((server, asyncio.get_running_loop()))
        await server.serve()

    gadget.regions[0].write = lambda offset, data: gadget.defer(
        lambda: gadget.dma.write(BASE + 8, gadget.dma.read(BASE, 4))
    )

    async def main() -> None:
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, serve()))
        ram = Ram(BASE, 0x4000)
        ram.write(BASE, b"data")
        async with await Client.connect(path) as client:
            await client.map(ram, shared=False)
            await client.call(region_write(0, 0, b"go"))
            await client.call(region_read(0, 0, 4))  # served after the deferred work, or in it
            await client.call(reset())
        assert ram.read(BASE + 8, 4) == b"data"
        ram.close()
        server, loop = servers[0]
        loop.call_soon_threadsafe(server.close)
        await thread

    asyncio.run(main())


def test_migration(gadget: Gadget, tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        await client.call(set_state(DeviceState.STOP_COPY))
        state = await client.call(read_state(4096))
        await client.call(set_state(DeviceState.RESUMING))
        await client.call(write_state(state + b" moved"))
        await client.call(set_state(DeviceState.RUNNING))
        assert await client.call(get_state()) == DeviceState.RUNNING
        assert gadget.state == b"state moved"

    drive(gadget, tmp_path / "s", test)


def test_commands_that_wait_for_a_server_that_ends(tmp_path: Path) -> None:
    async def main() -> None:
        silent = fdsocket.listen(tmp_path / "s")
        client = Client(fdsocket.connect(tmp_path / "s"), timeout=0.05)
        with pytest.raises(TimeoutError):
            await client.negotiate()
        client.timeout = 10
        asking = asyncio.create_task(client.negotiate())
        await asyncio.sleep(0)
        silent.close()
        with pytest.raises(ConnectionError):
            await asking
        assert not client.is_open
        with pytest.raises(ConnectionError):
            await client.negotiate()

    asyncio.run(main())


def test_a_server_that_is_in_use(gadget: Gadget, tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        with pytest.raises(CommandError) as refused:
            await Client.connect(tmp_path / "s")
        assert refused.value.errno == errno.EBUSY
        await client.call(device_info())

    drive(gadget, tmp_path / "s", test)
