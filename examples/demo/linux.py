# SPDX-License-Identifier: Apache-2.0
"""The guest of the demo as a real Linux on stock QEMU."""

from __future__ import annotations

import time

from tests.lab import Machine

MIB = 1 << 20


class LinuxGuest:
    """A running lab machine with the stock balloon driver of Linux."""

    def __init__(self, vm: Machine, freed: int = 300 * MIB) -> None:
        self.vm = vm
        self.memory = vm.config.memory * MIB
        self.freed = freed
        vm.guest.sh("keeper make /tmp/kept 32")
        vm.guest.load("virtio_balloon")
        vm.guest.report_everything()  # also report blocks smaller than 2 MiB

    def dirty(self) -> None:
        """Start a process that fills memory and holds it."""
        self._settle()
        self.vm.guest.start(f"memhog {self.freed // MIB}", log="/run/hog.log", fifo="/run/hog")
        self.vm.guest.wait_for("grep -q filled /run/hog.log")

    def _settle(self, quiet: float = 3.0) -> None:
        """Wait until all memory freed during the boot has been reported."""
        size, since = self.resident(), time.monotonic()
        while time.monotonic() - since < quiet:
            time.sleep(0.2)
            if self.resident() != size:
                size, since = self.resident(), time.monotonic()

    def free(self) -> None:
        """Have the process free its memory."""
        self.vm.guest.sh("echo free >/run/hog")

    def free_bytes(self) -> int:
        """Return ``MemFree`` in bytes."""
        return self.vm.guest.meminfo()["MemFree"]

    def resident(self) -> int:
        """Return the bytes that the RAM file occupies."""
        return self.vm.resident()

    def intact(self) -> bool:
        """Return whether the checksums of the kept files match."""
        return self.vm.guest.run("keeper check /tmp/kept").status == 0

    def idle(self) -> None:
        """Do nothing: this guest runs without help."""
        time.sleep(0.1)
