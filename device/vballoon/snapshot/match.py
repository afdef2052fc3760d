# SPDX-License-Identifier: Apache-2.0
"""Which memory backend of QEMU each file of guest memory is.

Over vhost-user, regions come with their addresses in QEMU's own memory, and QEMU tells where its
blocks lie there: no doubt is left.  Over vfio-user a file with a name is known by its inode, and
a memfd only by its size.  (``info mtree -f`` would tell, too, but it keeps a reference on every
device that is mapped, and none of them can be unplugged properly afterwards: QEMU 11.1.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.snapshot.qmp_vm import Memdev, QemuVm, RamBlock
    from vballoon.snapshot.source import GuestSource, RamFile

__all__ = ("match_memory",)


def match_memory(vm: QemuVm, source: GuestSource) -> list[tuple[Memdev, RamFile]]:
    """Each shared memory backend and its file.

    Raises :class:`~vballoon.errors.UsageError` where one has no file, or none for certain.
    """
    blocks = {block.name: block for block in vm.ram_blocks()}
    shared = [memdev for memdev in vm.memdevs() if memdev.share]
    if not shared:
        raise UsageError("the guest has no shared memory backend")
    matched = []
    for memdev in shared:
        files = [f for f in source.files if _belongs(f, memdev, blocks.get(memdev.id))]
        if len(files) != 1:
            what = "more than one" if files else "no"
            raise UsageError(f"{what} file of the balloon's backend is memory backend {memdev.id}")
        matched.append((memdev, files[0]))
    if len({file.fd for _, file in matched}) != len(matched):
        raise UsageError("memory backends of the same size cannot be told apart over vfio-user")
    return matched


def _belongs(file: RamFile, memdev: Memdev, block: RamBlock | None) -> bool:
    if file.size != memdev.size:
        return False
    if file.host_address and block is not None:
        return file.host_address == block.host
    if memdev.path:
        try:
            named, ours = os.stat(memdev.path), os.fstat(file.fd)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)
    return True
