# SPDX-License-Identifier: Apache-2.0
"""Run the demo: ``python -m examples.demo [--guest qemu|embedded] [--out DIRECTORY]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from examples.demo.story import Story
from rich.console import Console
from tests.lab.backend import Backend
from tests.lab.cache import LabError

CONSOLE = Console()


def on_qemu(folder: Path, kernel: str, transport: str) -> bool:
    """Run the demo on stock QEMU.  Raise LabError if the lab cannot be set up."""
    from examples.demo.linux import LinuxGuest
    from tests.lab import Machine, setup

    setup((kernel,))
    CONSOLE.print(f"booting Linux {kernel} on stock QEMU, attached over {transport}…")
    with (
        Backend(transport) as backend,
        Machine(
            kernel=kernel, machine="q35", memory=1024, smp=2, extra=backend.device("q35")
        ) as vm,
    ):
        guest = LinuxGuest(vm)
        release = vm.guest.sh("uname -r")
        CONSOLE.print(f"[green]•[/] Linux {release} is up after {vm.boot_seconds:.1f} s")
        return Story(guest, backend.ctl, CONSOLE).tell(backend.control_socket, folder)


def embedded(folder: Path) -> bool:
    """Run the demo on the embedded driver, over vhost-user on a real socket."""
    from examples.demo.embedded import EmbeddedGuest

    with Backend("vhost-user") as backend, EmbeddedGuest(backend.socket) as guest:
        return Story(guest, backend.ctl, CONSOLE).tell(backend.control_socket, folder)


def main() -> int:
    """Run the demo and return 0 if all results are as expected."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--guest", choices=("qemu", "embedded"), default="qemu")
    parser.add_argument("--kernel", default="6.12", help="6.1, 6.12 or backports")
    parser.add_argument("--transport", choices=("vhost-user", "vfio-user"), default="vhost-user")
    parser.add_argument("--out", type=Path, help="directory for the bitmap and the picture")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="vballoon-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if options.guest == "embedded":
        good = embedded(folder)
    else:
        try:
            good = on_qemu(folder, options.kernel, options.transport)
        except LabError as error:
            CONSOLE.print(f"[yellow]no QEMU guest here:[/] {error}")
            CONSOLE.print("[yellow]falling back to the embedded guest[/] (GUEST=embedded)")
            good = embedded(folder)
    CONSOLE.print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
