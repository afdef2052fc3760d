# SPDX-License-Identifier: Apache-2.0
"""Find the memory backend of QEMU for each file of guest memory.

The back-end's files are not trusted to be this QEMU's: a control socket of another VM would give
files of the same size.  QEMU reports the address of each block of its RAM, /proc says which inode
is mapped there and which files the process has open, and both must be the back-end's file.  This
holds for a memfd and for a file whose name was removed, too.  (``info mtree -f`` also shows the
mapping, but keeps a reference on every mapped device, which then cannot be unplugged: QEMU 11.1.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot.process import Process, identity

if TYPE_CHECKING:
    from vballoon.snapshot.qmp_vm import Memdev, QemuVm, RamBlock
    from vballoon.snapshot.source import GuestSource, RamFile

__all__ = ("match_memory",)


def match_memory(vm: QemuVm, source: GuestSource, process: Process) -> list[tuple[Memdev, RamFile]]:
    """Return each shared memory backend of *vm*, which is *process*, with its file.

    Raise :class:`~vballoon.errors.UsageError` if a memory backend has no file or more than one.
    """
    blocks = {block.name: block for block in vm.ram_blocks()}
    shared = [memdev for memdev in vm.memdevs() if memdev.share]
    if not shared:
        raise UsageError("the guest has no shared memory backend")
    matched = []
    for memdev in shared:
        block = blocks.get(memdev.id)
        if block is None:
            raise UsageError(f"QEMU reports no RAM block of memory backend {memdev.id}")
        files = [file for file in source.files if _is_block(file, memdev, block, process)]
        if len(files) != 1:
            raise UsageError(
                f"no file of the balloon's back-end is memory backend {memdev.id} of this QEMU "
                f"(process {process.pid}); does the control socket belong to another VM?"
            )
        matched.append((memdev, files[0]))
    return matched


def _is_block(file: RamFile, memdev: Memdev, block: RamBlock, process: Process) -> bool:
    """Return whether *file* is what *process* has mapped as *block*."""
    if file.size != memdev.size or block.size != memdev.size:
        return False
    if file.host_address and file.host_address != block.host:
        return False
    mapping = process.mapping_at(block.host)
    if mapping is None or not mapping.shared or mapping.inode != identity(file.fd)[1]:
        return False
    if mapping.offset + block.host - mapping.start:
        return False
    fd = process.open_file(identity(file.fd))
    if fd is None:
        return False
    os.close(fd)
    return True
