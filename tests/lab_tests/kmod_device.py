# SPDX-License-Identifier: Apache-2.0
"""The balloon inside the test process, so that a test sees its bits and layout as they are."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tests.lab import Machine

import fdsocket
from vballoon.balloon import Balloon
from vballoon.balloon.device import ALL_FEATURES
from vballoon.keeper.features import device_names, parse_features
from vballoon.keeper.transports import VfioUser, VhostUser
from vballoon.memory import GuestMemory, MemoryRegion, PageRanges
from vballoon.skipmap import Provenance
from vballoon.snapshot.memmap import FreeMemory, free_memory

T = TypeVar("T")
Bools = NDArray[np.bool_]


class LocalDevice:
    """A balloon served from a thread of this process.

    By default over vfio-user: with vhost-user, QEMU 11.1 can crash when it receives stop for the
    guest while a configuration change is on its way to it, and here a stop follows each round.
    With vfio-user, on the other hand, it crashes when the device is unplugged.
    """

    def __init__(self, transport: str = "vfio-user", features: int = ALL_FEATURES) -> None:
        self.transport = transport
        self.balloon = Balloon(features)
        self.ended: queue.Queue[dict[str, Any]] = queue.Queue()
        self.balloon.events = self._event
        self._socket = Path(tempfile.mkdtemp(prefix="kmod-")) / "device.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        made = {"vhost-user": VhostUser, "vfio-user": VfioUser}[transport]
        names = device_names()
        sock = fdsocket.listen(self._socket)
        self._server = made(self.balloon, parse_features(""), self._emit, names, sock=sock)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._server.run())
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        assert name != "QUEUE_BROKEN", data

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "ROUND_COMPLETED":
            self.ended.put(data)

    def ask(self, function: Callable[[], T]) -> T:
        """Call a function on the server's thread."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(30)

    def arguments(self, *, id_: str = "b0", bus: str | None = None) -> list[str]:
        """QEMU arguments that attach the device."""
        where = {"bus": bus} if bus else {}
        if self.transport == "vfio-user":
            path = {"type": "unix", "path": str(self._socket)}
            pci = {"driver": "vfio-user-pci", "id": id_, "socket": path, **where}
            return ["-device", json.dumps(pci)]
        device = {
            "driver": "vhost-user-test-device-pci",
            "id": id_,
            "chardev": f"c-{id_}",
            "virtio-id": 5,
            "num_vqs": 6,
            "vq_size": 128,
            "config_size": 24,
            **where,
        }
        chardev = f"socket,id=c-{id_},path={self._socket}"
        return ["-chardev", chardev, "-device", json.dumps(device)]

    def start_walk(self, min_order: int = 0) -> int:
        """Ask for a round; its id."""
        return self.ask(lambda: self.balloon.start_walk(min_order))

    def walk(self, min_order: int = 0, timeout: float = 60) -> dict[str, Any]:
        """Run a round to its end."""
        while not self.ended.empty():
            self.ended.get()
        number = self.start_walk(min_order)
        done = self.ended.get(timeout=timeout)
        assert done["round"] == number, done
        return done

    def walked(self) -> Bools:
        """One bool for each page of 4 KiB: the bits of the round."""
        return self.ask(lambda: as_bools(self.balloon.skipmap.extents(Provenance.WALKED)))

    def free_now(self, vm: Machine) -> FreeMemory:
        """Return the free memory of the stopped guest, read from outside by its layout."""
        if self.transport == "vhost-user":
            time.sleep(0.5)  # until the end of the round has been read: see above
        vm.qmp("stop")
        try:
            return self.ask(self._free)
        finally:
            vm.qmp("cont")

    def _free(self) -> FreeMemory:
        layout = self.balloon.walk_queue.memmap.layout
        assert layout is not None
        assert self.balloon.transport is not None
        return free_memory(layout, self.balloon.transport.memory)


def as_bools(pages: PageRanges) -> Bools:
    """Page ranges as one bool for each page."""
    found = np.zeros(int(pages.end[-1]) if len(pages) else 0, np.bool_)
    found[pages.numbers().astype(np.intp)] = True
    return found


def same_length(*arrays: Bools) -> list[Bools]:
    """Return the arrays, each padded with False to the length of the longest."""
    size = max(array.size for array in arrays)
    return [np.pad(array, (0, size - array.size)) for array in arrays]


def memory_of(vm: Machine) -> GuestMemory:
    """Return the guest's memory by its file, without a device (below 2 GiB: in one region)."""
    fd = os.open(vm.ram[0].path, os.O_RDWR)
    size = vm.ram[0].size()
    return GuestMemory([MemoryRegion.map(guest_phys_addr=0, size=size, file_offset=0, fd=fd)])
