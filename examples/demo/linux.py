# SPDX-License-Identifier: Apache-2.0
"""The guest of the demo as a real Linux on stock QEMU."""

from __future__ import annotations

import time

from tests.lab import Machine

MIB = 1 << 20


class LinuxGuest:
    """A running lab machine whose balloon driver is stock Linux'."""

    def __init__(self, vm: Machine, freed: int = 300 * MIB) -> None:
        self.vm = vm
        self.memory = vm.config.memory * MIB
        self.freed = freed
        vm.guest.sh("keeper make /tmp/kept 32")
        vm.guest.load("virtio_balloon")
        vm.guest.report_everything()  # also what is freed in pieces below 2 MiB

    def dirty(self) -> None:
        """A process fills memory and holds it."""
        self._settle()
        self.vm.guest.start(f"memhog {self.freed // MIB}", log="/run/hog.log", fifo="/run/hog")
        self.vm.guest.wait_for("grep -q filled /run/hog.log")

    def _settle(self, quiet: float = 3.0) -> None:
        """Until reporting has nothing left to give back from the boot."""
        size, since = self.resident(), time.monotonic()
        while time.monotonic() - since < quiet:
            time.sleep(0.2)
            if self.resident() != size:
                size, since = self.resident(), time.monotonic()

    def free(self) -> None:
        """It lets go of it."""
        self.vm.guest.sh("echo free >/run/hog")

    def free_bytes(self) -> int:
        """``MemFree``."""
        return self.vm.guest.meminfo()["MemFree"]

    def resident(self) -> int:
        """Blocks of the RAM file."""
        return self.vm.resident()

    def intact(self) -> bool:
        """The checksums still match."""
        return self.vm.guest.run("keeper check /tmp/kept").status == 0

    def idle(self) -> None:
        """It runs by itself."""
        time.sleep(0.1)
