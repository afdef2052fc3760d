# SPDX-License-Identifier: Apache-2.0
"""One descriptor chain, built up and checked element by element.

The rules that are the same for both ring formats live here; so does the way from chains to a
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
"""Bytes of a whole chain (label: … / The Virtqueue Descriptor Table, driver requirements)."""

DESC_BYTES = 16
"""Bytes of a descriptor, in either format."""


@dataclass(slots=True)
class Chain:
    """The elements of one buffer: ``id`` names it, ``slots`` is what it takes of the ring
    (and ``ring`` a copy of those descriptors, packed rings only)."""

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
        """Append an element; raises :class:`~vballoon.errors.QueueError` for one against rules."""
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
    """How many descriptors the table has; raises :class:`~vballoon.errors.QueueError`.

    The table may be at any address, also an odd one, and may cross from one region into the next.
    """
    if not negotiated:
        raise QueueError(rules.INDIRECT_NOT_NEGOTIATED, f"{addr:#x}+{length:#x}")
    if length == 0 or length % DESC_BYTES:
        raise QueueError(rules.INDIRECT_SIZE, f"{length} bytes")
    if not memory.holds(addr, length):
        raise QueueError(rules.INDIRECT_ADDRESS, f"{addr:#x}+{length:#x}")
    return length // DESC_BYTES


def batch_of(memory: GuestMemory, chains: Sequence[Chain]) -> ChainBatch:
    """The columns of *chains*."""
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
    """The buffers of *one* followed by those of *two*."""
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
