# SPDX-License-Identifier: Apache-2.0
"""``examples/dma_engine.py``: a copy, its interrupt, and a move in the middle."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from examples.dma_engine import DmaEngine

from vfio_user.requests import read_state, set_state, write_state
from vfio_user.testing import LocalClient, Ram, events
from virtio_formats.vfio_user import DeviceState, PciIrq, PciRegion

BASE = 0x10000


def connect(ram: Ram, fd: int) -> LocalClient:
    client = LocalClient(DmaEngine())
    client.negotiate()
    client.map(ram)
    client.assign(PciIrq.MSIX, [fd])
    return client


def ring(client: LocalClient, source: int, destination: int, length: int) -> None:
    client.write(PciRegion.BAR0, 0, struct.pack("<QQQ", source, destination, length))
    client.write(PciRegion.BAR0, 24, b"\1")


def test_it_is_moved_and_continues() -> None:
    ram, fd = Ram(BASE, 0x4000), os.eventfd(0, os.EFD_NONBLOCK)
    ram.write(BASE, b"precious data")
    here, there = connect(ram, fd), connect(ram, fd)
    here.set_config(here.session.device.msix.offset + 2, 0x8000, 2)  # type: ignore[attr-defined]
    ring(here, BASE, BASE + 0x1000, 13)
    assert (ram.read(BASE + 0x1000, 13), events(fd)) == (b"precious data", 1)
    here.do(set_state(DeviceState.STOP_COPY))
    state = here.do(read_state(1 << 16)) or b""
    there.do(set_state(DeviceState.RESUMING))
    there.do(write_state(state))
    there.do(set_state(DeviceState.RUNNING))
    assert there.read(PciRegion.BAR0, 0, 24) == struct.pack("<QQQ", BASE, BASE + 0x1000, 13)
    there.write(PciRegion.BAR0, 8, struct.pack("<Q", BASE + 0x2000))
    there.write(PciRegion.BAR0, 24, b"\1")
    assert (ram.read(BASE + 0x2000, 13), events(fd)) == (b"precious data", 1)
    ring(there, 0, BASE, 13)
    assert (there.read(PciRegion.BAR0, 24, 1), events(fd)) == (b"\2", 1)
    there.do(set_state(DeviceState.RESUMING))
    there.do(write_state(state[:-1]))
    there.do(set_state(DeviceState.RUNNING), expect=errno.EINVAL)
    for client in (here, there):
        client.close()
    ram.close()
    os.close(fd)


def test_the_examples_are_short() -> None:
    for name in ("edu.py", "dma_engine.py", "rng.py"):
        path = Path(__file__).parents[2] / "examples" / name
        assert len(path.read_text().splitlines()) < 120, name
