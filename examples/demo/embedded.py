# SPDX-License-Identifier: Apache-2.0
"""The guest of the demo without QEMU: a small driver with a toy allocator, over real vhost-user.

Its memory is a memfd, its rings are real, and it reacts to the configuration space as the driver of
Linux does.  Only the operating system is missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
from tests.fakes.driver import Element
from tests.fakes.frontend import Frontend, Ring
from tests.fakes.memory import Arena, make_memory

import virtio_formats.vhost_user as vu
from virtio_formats.virtio.balloon import (
    CMD_ID_FIRST,
    CMD_ID_STOP,
    BalloonConfig,
    BalloonFeature,
    BalloonStat,
    StatTag,
)

MIB = 1 << 20
PAGE = 4096
KERNEL = 16 * MIB
"""Size in bytes of the rings, the buffers and the data that this guest keeps."""
BLOCK = 512
"""Pages of a free block that is reported or hinted: order 9."""
PFNS = 256
"""Page numbers in an inflate buffer, the same number that Linux sends."""


class EmbeddedGuest:
    """A guest that is connected, negotiated and DRIVER_OK inside its ``with`` block."""

    def __init__(self, socket: Path, memory: int = 256 * MIB, freed: int = 96 * MIB) -> None:
        self.memory, self.freed = memory, freed
        self._ram = make_memory((0, memory))
        self._front = Frontend.connect(socket, self._ram)
        self._front.arena = Arena(PAGE, KERNEL // 2)
        self._free = np.ones(memory // PAGE, dtype=np.bool_)
        self._free[: KERNEL // PAGE] = False
        self._balloon: list[int] = []
        self._round = 0
        self._kept = np.random.default_rng(7).integers(0, 256, KERNEL // 2, dtype=np.uint8)

    def __enter__(self) -> Self:
        unwanted = BalloonFeature.PAGE_POISON | BalloonFeature.FREE_PAGE_WALK
        offered = self._front.get_u64(vu.Request.GET_FEATURES)
        log = int(vu.VhostFeature.LOG_ALL)
        self._front.negotiate(wanted=offered & ~int(unwanted) & ~log)
        self._front.share_memory()
        self._rings = [self._front.new_ring(i, 128) for i in range(5)]
        self._front.status_ok()
        self._ram.window(KERNEL // 2, KERNEL // 2)[:] = self._kept
        self._send_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self._front.close()

    # The interface of Guest.

    def dirty(self) -> None:
        """Write random bytes into the last part of memory."""
        first = (self.memory - self.freed) // PAGE
        self._free[first:] = False
        view = self._ram.window(first * PAGE, self.freed)
        view[:] = np.random.default_rng(1).integers(0, 256, self.freed, dtype=np.uint8)

    def free(self) -> None:
        """Free the dirty memory and report it block by block."""
        first = (self.memory - self.freed) // PAGE
        ring = self._rings[4]
        for at in range(first, self.memory // PAGE, 16 * BLOCK):
            blocks = range(at, min(at + 16 * BLOCK, self.memory // PAGE), BLOCK)
            self._use(ring, [Element(pfn * PAGE, BLOCK * PAGE, True) for pfn in blocks])
        self._free[first:] = True

    def free_bytes(self) -> int:
        """Return the free memory in bytes."""
        return int(self._free.sum()) * PAGE

    def resident(self) -> int:
        """Return the bytes that the memory file occupies."""
        region = self._ram.regions[0]
        assert region.fd is not None
        return os.fstat(region.fd).st_blocks * 512

    def intact(self) -> bool:
        """Return whether the data kept since the start is unchanged."""
        return bool((self._ram.window(KERNEL // 2, KERNEL // 2) == self._kept).all())

    def idle(self) -> None:
        """Read the configuration space and the rings once, and do what the device requests."""
        config = BalloonConfig.parse(self._config())
        missing = config.num_pages - len(self._balloon)
        if missing > 0:
            self._inflate(min(missing, 16 * PFNS))
        elif missing < 0:
            self._deflate(min(-missing, 16 * PFNS))
        if config.free_page_hint_cmd_id >= CMD_ID_FIRST != self._round:
            self._hint(config.free_page_hint_cmd_id)
        if self._rings[2].driver.collect():
            self._send_stats()

    # The driver.

    def _config(self) -> bytes:
        size = BalloonConfig.SIZE
        ask = vu.VhostUserConfig(offset=0, size=size, flags=0, region=bytes(size))
        reply = self._front.call(vu.Request.GET_CONFIG, ask.build())
        return vu.VhostUserConfig.parse(reply).region

    def _use(self, ring: Ring, elements: list[Element]) -> None:
        """Make one buffer available, kick, and wait until it is used."""
        ring.driver.add(*elements)
        ring.driver.publish()
        if ring.driver.should_kick():
            ring.kick()
        ring.collect(1)

    def _bytes(self, data: bytes) -> Element:
        at = KERNEL // 2 - 64 * 1024  # one buffer at a time, so one place is enough
        self._ram.write(at, data)
        return Element(at, len(data))

    def _inflate(self, count: int) -> None:
        pfns = np.flatnonzero(self._free)[-count:]
        self._free[pfns] = False
        for part in np.array_split(pfns, -(-pfns.size // PFNS) or 1):
            self._use(self._rings[0], [self._bytes(part.astype("<u4").tobytes())])
        self._balloon += pfns.tolist()
        self._write_actual()

    def _deflate(self, count: int) -> None:
        pfns = np.array(self._balloon[-count:])
        del self._balloon[-count:]
        for part in np.array_split(pfns, -(-pfns.size // PFNS) or 1):
            self._use(self._rings[1], [self._bytes(part.astype("<u4").tobytes())])
        self._free[pfns] = True
        self._write_actual()

    def _write_actual(self) -> None:
        actual = len(self._balloon).to_bytes(4, "little")
        write = vu.VhostUserConfig(offset=4, size=4, flags=0, region=actual)
        self._front.ok(vu.Request.SET_CONFIG, write.build())

    def _hint(self, cmd_id: int) -> None:
        self._round = cmd_id
        ring = self._rings[3]
        self._use(ring, [self._bytes(cmd_id.to_bytes(4, "little"))])
        whole = self._free.reshape(-1, BLOCK).all(axis=1)
        for block in np.flatnonzero(whole).tolist():
            self._use(ring, [Element(block * BLOCK * PAGE, BLOCK * PAGE, True)])
        self._use(ring, [self._bytes(CMD_ID_STOP.to_bytes(4, "little"))])

    def _send_stats(self) -> None:
        values = dict.fromkeys(StatTag, 0) | {
            StatTag.MEMFREE: self.free_bytes(),
            StatTag.MEMTOT: self.memory,
        }
        data = b"".join(BalloonStat(tag=tag, val=val).build() for tag, val in values.items())
        at = KERNEL // 2 - 128 * 1024  # stays with the device until it asks again
        self._ram.write(at, data)
        ring = self._rings[2]
        ring.driver.add(Element(at, len(data)))
        ring.driver.publish()
        ring.kick()
