# SPDX-License-Identifier: Apache-2.0
"""One descriptor chain, built and checked element by element.

This module has the rules that both ring formats share, and the conversion from chains to a
:class:`~vballoon.virtqueue.base.ChainBatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import QueueError
from vballoon.virtqueue import rules
from vballoon.virtqueue.base import ChainBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.memory import GuestMemory

__all__ = ("CHAIN_BYTES_MAX", "Chain", "batch_of", "check_indirect_table", "joined")

CHAIN_BYTES_MAX = 1 << 32
"""Maximum bytes of a chain (label: … / The Virtqueue Descriptor Table, driver requirements)."""

DESC_BYTES = 16
"""Size of a descriptor in bytes, in either format."""


@dataclass(slots=True)
class Chain:
    """The elements of one buffer: its ``id``, and the number of ring ``slots`` that it occupies
    (``ring`` is a copy of those descriptors, for packed rings only)."""

    memory: GuestMemory
    limit: int
    id: int = 0
    slots: int = 1
    addr: list[int] = field(default_factory=list)
    len: list[int] = field(default_factory=list)
    writable: list[bool] = field(default_factory=list)
    total: int = 0
    ring: bytes = b""

    def add(self, addr: int, length: int, writable: bool) -> None:
        """Append an element.  Raise :class:`~vballoon.errors.QueueError` if it breaks a rule."""
        if len(self.addr) >= self.limit:
            raise QueueError(rules.CHAIN_TOO_LONG, f"more than {self.limit} descriptors")
        if not self.memory.holds(addr, length):
            raise QueueError(rules.DESC_ADDRESS, f"{addr:#x}+{length:#x}")
        if self.writable and self.writable[-1] and not writable:
            raise QueueError(rules.DESC_ORDER, f"{addr:#x}+{length:#x} is readable")
        self.total += length
        if self.total > CHAIN_BYTES_MAX:
            raise QueueError(rules.DESC_LENGTH_OVERFLOW, f"{self.total:#x} bytes")
        self.addr.append(addr)
        self.len.append(length)
        self.writable.append(writable)


def check_indirect_table(memory: GuestMemory, negotiated: bool, addr: int, length: int) -> int:
    """Return the number of descriptors of the table.  Raise :class:`~vballoon.errors.QueueError`.

    The table may be at any address, even an odd one, and may span adjacent regions.
    """
    if not negotiated:
        raise QueueError(rules.INDIRECT_NOT_NEGOTIATED, f"{addr:#x}+{length:#x}")
    if length == 0 or length % DESC_BYTES:
        raise QueueError(rules.INDIRECT_SIZE, f"{length} bytes")
    if not memory.holds(addr, length):
        raise QueueError(rules.INDIRECT_ADDRESS, f"{addr:#x}+{length:#x}")
    return length // DESC_BYTES


def batch_of(memory: GuestMemory, chains: Sequence[Chain]) -> ChainBatch:
    """Return the columns of *chains*."""
    counts = [len(chain.addr) for chain in chains]
    first = np.zeros(len(chains) + 1, np.intp)
    np.cumsum(counts, out=first[1:])
    return ChainBatch(
        ids=np.array([chain.id for chain in chains], np.uint16),
        first=first,
        addr=np.array([a for chain in chains for a in chain.addr], np.uint64),
        len=np.array([n for chain in chains for n in chain.len], np.uint32),
        writable=np.array([w for chain in chains for w in chain.writable], np.bool_),
        memory=memory,
    )


def joined(one: ChainBatch, two: ChainBatch) -> ChainBatch:
    """Return the buffers of *one* followed by those of *two*."""
    if not len(one) or not len(two):
        return one if len(one) else two
    return ChainBatch(
        ids=np.concatenate((one.ids, two.ids)),
        first=np.concatenate((one.first, two.first[1:] + one.first[-1])),
        addr=np.concatenate((one.addr, two.addr)),
        len=np.concatenate((one.len, two.len)),
        writable=np.concatenate((one.writable, two.writable)),
        memory=one.memory,
    )
