# SPDX-License-Identifier: Apache-2.0
"""Commands for whoever copies the guest's memory: its files, and where its page structures are.

The files of guest memory go out by descriptor, so that a snapshot needs neither QEMU's process
nor root, and still has them when the device is unplugged.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from vballoon.control.commands import COMMANDS
from vballoon.control.session import CommandError
from vballoon.control.table import Argument, Reply

if TYPE_CHECKING:
    from vballoon.balloon import Balloon
    from vballoon.control.operator import Operator
    from vballoon.memory import MemoryRegion

__all__ = ("COMMANDS",)

FILES_MAX = 4096
"""Files of guest memory that can be asked for; QEMU has one for each memory backend."""


def _files(operator: Operator) -> dict[tuple[int, int], MemoryRegion]:
    """A region of each file of guest memory, by the file's identity, in address order."""
    found: dict[tuple[int, int], MemoryRegion] = {}
    for region in operator.require_memory().memory.regions:
        if region.fd is not None:
            status = os.fstat(region.fd)
            found.setdefault((status.st_dev, status.st_ino), region)
    return found


@COMMANDS.command("query-guest-memory")
def query_guest_memory(operator: Operator) -> dict[str, Any]:
    """Show guest memory's regions and the files they are in (null: memory without a file).

    The files are numbered; get-guest-memory-fd hands them out.
    """
    files = list(_files(operator))
    regions = []
    for region in operator.require_memory().memory.regions:
        number = None
        if region.fd is not None:
            status = os.fstat(region.fd)
            number = files.index((status.st_dev, status.st_ino))
        regions.append(
            {
                "guest-phys-addr": region.guest_phys_addr,
                "size": region.size,
                "file": number,
                "file-offset": region.file_offset,
                "userspace-addr": region.userspace_addr,
            }
        )
    return {
        "regions": regions,
        "files": [{"device": device, "inode": inode} for device, inode in files],
        "poison": operator.require_memory().poison,
    }


@COMMANDS.command(
    "get-guest-memory-fd",
    {"file": Argument(int, "its number in query-guest-memory", maximum=FILES_MAX)},
)
def get_guest_memory_fd(operator: Operator, file: int) -> Reply:
    """Hand out a file of guest memory: a read-only descriptor comes with the reply (SCM_RIGHTS)."""
    files = list(_files(operator).items())
    if file >= len(files):
        raise CommandError(f"there are {len(files)} files of guest memory")
    (device, inode), region = files[file]
    assert region.fd is not None  # only such are listed
    return Reply({"device": device, "inode": inode}, (_read_only(region.fd),))


def _read_only(fd: int) -> int:
    """The same file opened anew where that is possible: a position of its own, and no writing."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)


@COMMANDS.command("get-memmap-layout")
def get_memmap_layout(operator: Operator) -> Reply:
    """Hand out where the guest keeps its page structures (from the guest module), as a descriptor.

    It holds a struct walk_memmap and the runs behind it. Only a stopped guest may be read by it,
    and only after the checks of the walk queue's specification.
    """
    walk = cast("Balloon", operator.balloon).walk_queue
    layout = walk.memmap.layout
    if layout is None:
        raise CommandError("the guest has not told where its page structures are (guest module?)")
    fd = os.memfd_create("vballoon-memmap", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(layout.header.build())
        file.write(layout.runs.tobytes())
    os.lseek(fd, 0, os.SEEK_SET)
    value = {
        "runs": int(layout.runs.size),
        "partial": layout.partial,
        "managed-pages": walk.begin.managed_pages if walk.begin is not None else None,
    }
    return Reply(value, (fd,))
