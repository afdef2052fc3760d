# SPDX-License-Identifier: Apache-2.0
"""Commands for programs that copy guest memory: its files, and the guest's memmap layout.

The files of guest memory are handed out as descriptors.  So a snapshot needs neither access to
QEMU's process nor root, and it keeps the files when the device is unplugged.
"""

from __future__ import annotations

import fcntl
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

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FILES_MAX = 4096
"""Maximum number of guest memory files; QEMU has one for each memory backend."""


def _files(operator: Operator) -> dict[tuple[int, int], MemoryRegion]:
    """Return one region for each file of guest memory, by the file's identity, in address order."""
    found: dict[tuple[int, int], MemoryRegion] = {}
    for region in operator.require_memory().memory.regions:
        if region.fd is not None:
            status = os.fstat(region.fd)
            found.setdefault((status.st_dev, status.st_ino), region)
    return found


@COMMANDS.command("query-guest-memory")
def query_guest_memory(operator: Operator) -> dict[str, Any]:
    """Show the regions of guest memory and the file of each (null: memory without a file).

    Files are numbered from 0; get-guest-memory-fd hands them out.
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
        "target": cast("Balloon", operator.balloon).target_bytes,
    }


@COMMANDS.command(
    "get-guest-memory-fd",
    {"file": Argument(int, "number of the file in query-guest-memory", maximum=FILES_MAX)},
    same_user=True,
)
def get_guest_memory_fd(operator: Operator, file: int) -> Reply:
    """Return a file of guest memory: the reply carries a read-only descriptor (SCM_RIGHTS).

    A memfd has mode 0777, so whoever has any descriptor of it can open it again for writing. The
    file belongs to the front-end and its mode cannot be changed here: only root and the server's
    own user get one.
    """
    files = list(_files(operator).items())
    if file >= len(files):
        raise CommandError(f"there are {len(files)} files of guest memory")
    (device, inode), region = files[file]
    assert region.fd is not None  # only such are listed
    return Reply({"device": device, "inode": inode}, (_read_only(region.fd),))


def _read_only(fd: int) -> int:
    """Return a new, read-only open of the same file, with its own position."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # a duplicate would be writable, and share its position
        raise CommandError(
            f"the memory file cannot be opened read-only: {error.strerror}"
        ) from None


@COMMANDS.command("get-memmap-layout")
def get_memmap_layout(operator: Operator) -> Reply:
    """Return the guest's memmap layout, as the guest module reported it, in a memfd.

    The memfd holds a struct walk_memmap followed by its runs. Use it only on a stopped guest, and
    only after the checks of the walk queue's specification.
    """
    walk = cast("Balloon", operator.balloon).walk_queue
    layout = walk.memmap.layout
    if layout is None:
        raise CommandError(
            "the guest has reported no memmap layout; load vballoon_walk in the guest"
        )
    fd = os.memfd_create("vballoon-memmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(layout.header.build())
        file.write(layout.runs.tobytes())
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    value = {
        "runs": int(layout.runs.size),
        "partial": layout.partial,
        "managed-pages": walk.begin.managed_pages if walk.begin is not None else None,
    }
    return Reply(value, (fd,))
