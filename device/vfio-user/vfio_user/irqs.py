# SPDX-License-Identifier: Apache-2.0
"""Interrupts: which eventfd belongs to which vector, what is masked, what is pending.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DEVICE_GET_IRQ_INFO`` and
``VFIO_USER_DEVICE_SET_IRQS``.  MSI and MSI-X are edges: an edge on a masked vector, or on one
that has no eventfd at the moment, stays pending until it can be delivered.  INTx is a level: it
is signalled once, masks itself (AUTOMASKED), and is signalled again on unmask while it is still
asserted.  A client may give an eventfd with which it unmasks INTx, as VFIO has it.

A vector can be masked twice: by the client (a SET_IRQS message) and by the function itself (the
mask bit of its MSI-X table entry).  An edge is delivered when neither applies.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vfio_user.descriptors import Descriptors
from vfio_user.errors import RequestError, UsageError
from vfio_user.state import IrqState, IrqVector, require
from virtio_formats.vfio_user import (
    PCI_NUM_IRQS,
    IrqInfo,
    IrqInfoFlags,
    IrqSet,
    IrqSetFlags,
    PciIrq,
)

__all__ = ("MAX_VECTORS", "IrqTable")

MAX_VECTORS = 2048
"""Vectors of one interrupt index: what an MSI-X table can hold."""

_DATA = IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD
_ACTIONS = IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER
_DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


@dataclass(slots=True)
class _Vector:
    """One interrupt: its descriptors by action, and its state."""

    trigger: int | None = None
    on_mask: int | None = None
    on_unmask: int | None = None
    masked: bool = False
    """By the client."""
    barred: bool = False
    """By the function itself."""
    pending: bool = False


class IrqTable:
    """The interrupts of a device, and the client's eventfds for them.

    *counts* gives the number of vectors of each index of
    :class:`~virtio_formats.vfio_user.PciIrq`; *descriptors* owns the eventfds.
    *on_state(index, start, count, masked)* is called when the client masks or unmasks.
    """

    def __init__(self, counts: Mapping[int, int], descriptors: Descriptors | None = None) -> None:
        for index, count in counts.items():
            if index not in tuple(PciIrq) or not 0 <= count <= MAX_VECTORS:
                raise UsageError(f"{count} vectors of interrupt index {index}")
        if counts.get(PciIrq.INTX, 0) > 1:
            raise UsageError("a function has one INTx interrupt at most")
        self._vectors = [
            [_Vector() for _ in range(counts.get(index, 0))] for index in range(PCI_NUM_IRQS)
        ]
        self._descriptors = descriptors or Descriptors()
        self._asserted = False
        self._held: set[int] = set()
        self.on_state: Callable[[int, int, int, bool], None] | None = None
        self._on_unmask_fd: Callable[[int | None], None] | None = None
        self.add_one: Callable[[int], object] = _add_one
        """Adds 1 to an eventfd of the client.  The default can block where the client clears
        ``O_NONBLOCK`` and fills the counter at the same instant; replace it where that matters."""

    def add(self, index: int, count: int) -> None:
        """Give *index* the vectors that it did not have so far.

        Raise :class:`~vfio_user.errors.UsageError` if it has some, or for an impossible number.
        """
        if self._vectors[index] or not 0 < count <= MAX_VECTORS:
            raise UsageError(f"{count} vectors of interrupt index {index}")
        self._vectors[index] += [_Vector() for _ in range(count)]

    def count(self, index: int) -> int:
        """Return how many vectors *index* has."""
        return len(self._vectors[index])

    # -- the device's side ------------------------------------------------------------------------

    def trigger(self, index: int, vector: int = 0) -> bool:
        """Signal an edge on a vector; return False if it stays pending for now.

        Raise :class:`~vfio_user.errors.UsageError` for a vector that the device does not have.
        """
        entry = self._entry(index, vector)
        entry.pending = True
        self._deliver(index, entry)
        return not entry.pending

    def set_intx(self, asserted: bool) -> None:
        """Drive the level of INTx."""
        self._asserted = asserted
        self._deliver_intx()

    def set_mask(self, index: int, vector: int, masked: bool) -> None:
        """Mask or unmask a vector from the device's side (an MSI-X table entry was written)."""
        entry = self._entry(index, vector)
        if entry.barred == masked:
            return
        self._signal(entry.on_mask if masked else entry.on_unmask)
        entry.barred = masked
        self._try(index, entry)

    def hold(self, index: int, held: bool) -> None:
        """Keep back every edge of *index* (the function mask of MSI-X), or deliver them."""
        if held:
            self._held.add(index)
        elif index in self._held:
            self._held.discard(index)
            for entry in self._vectors[index]:
                self._deliver(index, entry)

    def is_held(self, index: int) -> bool:
        """Return whether *index* is held."""
        return index in self._held

    def pending(self, index: int) -> list[bool]:
        """Return which vectors wait for delivery (the pending bits of MSI-X)."""
        return [entry.pending for entry in self._vectors[index]]

    def clear_pending(self) -> None:
        """Forget edges that were not delivered, INTx, and the function's masks: a reset."""
        self._asserted = False
        self._held.clear()
        for vectors in self._vectors:
            for entry in vectors:
                entry.pending = entry.barred = False

    def close(self) -> None:
        """Close the client's descriptors and drop its masks; pending edges stay."""
        for index in range(PCI_NUM_IRQS):
            self._disable(index)

    # -- the client's side ------------------------------------------------------------------------

    def describe(self, index: int) -> bytes:
        """Return the reply to DEVICE_GET_IRQ_INFO.  Raise RequestError for an unknown index."""
        if index >= PCI_NUM_IRQS:
            raise RequestError(errno.EINVAL, f"no interrupt index {index}")
        flags = IrqInfoFlags.EVENTFD
        if index in (PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX):
            flags |= IrqInfoFlags.MASKABLE
        if index == PciIrq.INTX:
            flags |= IrqInfoFlags.AUTOMASKED
        info = IrqInfo(argsz=IrqInfo.SIZE, flags=flags, index=index, count=self.count(index))
        return info.build()

    def set(self, request: IrqSet, data: bytes, fds: Sequence[int]) -> None:
        """Serve DEVICE_SET_IRQS.  Take all of *fds* over on success, none on an error.

        Raise :class:`~vfio_user.errors.RequestError` EINVAL; nothing has changed then.
        """
        self._check(request, data, fds)
        if request.count == 0:
            self._disable(request.index)
            return
        entries = self._vectors[request.index][request.start : request.start + request.count]
        if request.flags & IrqSetFlags.DATA_EVENTFD:
            self._assign(request, entries, fds)
            return
        wanted = data if request.flags & IrqSetFlags.DATA_BOOL else b"\1" * request.count
        self._act(request, [e for e, yes in zip(entries, wanted, strict=True) if yes])

    def _check(self, request: IrqSet, data: bytes, fds: Sequence[int]) -> None:
        for ok, text in self._rules(request, data, fds):
            if not ok:
                raise RequestError(errno.EINVAL, f"SET_IRQS: {text}")

    def _rules(
        self, request: IrqSet, data: bytes, fds: Sequence[int]
    ) -> Sequence[tuple[bool, str]]:
        index, flags, count = request.index, request.flags, request.count
        kind, action = flags & _DATA, flags & _ACTIONS
        if index >= PCI_NUM_IRQS:
            return ((False, f"no interrupt index {index}"),)
        edge = index in (PciIrq.ERR, PciIrq.REQ)
        bools = count if kind == IrqSetFlags.DATA_BOOL else 0
        room = self.count(index)
        return (
            (IrqSet.SIZE <= request.argsz <= IrqSet.SIZE + len(data), "argsz"),
            (flags == kind | action, "unknown flags"),
            (kind.bit_count() == 1, "exactly one kind of data"),
            (action.bit_count() == 1, "exactly one action"),
            (len(data) == bools, "data that does not match count"),
            (request.start <= room and count <= room - request.start, "vectors out of range"),
            (bool(count) or (flags == _DISABLE and not request.start), "count 0"),
            (not fds or kind == IrqSetFlags.DATA_EVENTFD, "descriptors without DATA_EVENTFD"),
            (not fds or len(fds) == count, "as many descriptors as vectors"),
            (not edge or action == IrqSetFlags.ACTION_TRIGGER, "this index cannot be masked"),
            (
                index != PciIrq.INTX
                or kind != IrqSetFlags.DATA_EVENTFD
                or action != IrqSetFlags.ACTION_MASK,
                "INTx is masked by message only",
            ),
            (all(_is_eventfd(fd) for fd in fds), "a descriptor that is no eventfd"),
        )

    def _assign(self, request: IrqSet, entries: Sequence[_Vector], fds: Sequence[int]) -> None:
        for position, entry in enumerate(entries):
            fd = fds[position] if fds else None
            if fd is not None:
                self._descriptors.take(fd)
            if request.flags & IrqSetFlags.ACTION_MASK:
                fd, entry.on_mask = entry.on_mask, fd
            elif request.flags & IrqSetFlags.ACTION_UNMASK:
                fd, entry.on_unmask = entry.on_unmask, fd
                if request.index == PciIrq.INTX:
                    self._watch_unmask()
            else:
                fd, entry.trigger = entry.trigger, fd
                self._assigned(request.index, entry)
            self._descriptors.close(fd)

    def _assigned(self, index: int, entry: _Vector) -> None:
        if index == PciIrq.INTX:
            entry.masked = False
            self._deliver_intx()
        else:
            self._deliver(index, entry)

    def _act(self, request: IrqSet, entries: Sequence[_Vector]) -> None:
        if request.flags & IrqSetFlags.ACTION_TRIGGER:
            for entry in entries:
                self._signal(entry.trigger)
            return
        masked = bool(request.flags & IrqSetFlags.ACTION_MASK)
        for entry in entries:
            if request.index != PciIrq.INTX:
                self._signal(entry.on_mask if masked else entry.on_unmask)
            entry.masked = masked
            self._try(request.index, entry)
        if self.on_state is not None:
            self.on_state(request.index, request.start, request.count, masked)

    def watch_unmask(self, watch: Callable[[int | None], None] | None) -> None:
        """Call *watch(fd)* with the eventfd by which the client unmasks INTx, now and on changes.

        As in VFIO, the client signals that eventfd (KVM does when the guest ends the interrupt);
        whoever watches it calls :meth:`unmask_intx`.
        """
        self._on_unmask_fd = watch
        self._watch_unmask()

    def _watch_unmask(self) -> None:
        entries = self._vectors[PciIrq.INTX]
        if self._on_unmask_fd is not None:
            self._on_unmask_fd(entries[0].on_unmask if entries else None)

    def unmask_intx(self) -> None:
        """Unmask INTx if the client has signalled its eventfd, and signal it if still asserted."""
        for entry in self._vectors[PciIrq.INTX]:
            if entry.on_unmask is not None and _consumed(entry.on_unmask):
                entry.masked = False
                self._deliver_intx()

    def _disable(self, index: int) -> None:
        if index == PciIrq.INTX and self._on_unmask_fd is not None:
            self._on_unmask_fd(None)
        for entry in self._vectors[index]:
            for fd in (entry.trigger, entry.on_mask, entry.on_unmask):
                self._descriptors.close(fd)
            entry.trigger = entry.on_mask = entry.on_unmask = None
            entry.masked = False

    # -- state ------------------------------------------------------------------------------------

    def function_state(self) -> tuple[tuple[int, ...], tuple[IrqState, ...]]:
        """Return the held indices, and the vectors with a pending edge or a mask of their own."""
        vectors = tuple(
            IrqState(index=index, vector=number, pending=entry.pending, barred=entry.barred)
            for index, entries in enumerate(self._vectors)
            for number, entry in enumerate(entries)
            if entry.pending or entry.barred
        )
        return tuple(sorted(self._held)), vectors

    def check_function(self, held: Sequence[int], irqs: Sequence[IrqState]) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` for a state that cannot be this one's."""
        require(all(0 <= index < PCI_NUM_IRQS for index in held), f"held indices {held}")
        self._check_vectors([(irq.index, irq.vector) for irq in irqs])

    def restore_function(self, held: Sequence[int], irqs: Sequence[IrqState]) -> None:
        """Take a checked state over; nothing is signalled."""
        self.clear_pending()
        self._held = set(held)
        for irq in irqs:
            entry = self._vectors[irq.index][irq.vector]
            entry.pending, entry.barred = irq.pending, irq.barred

    def client_state(self) -> tuple[IrqVector, ...]:
        """Return the vectors for which the client has set anything up."""
        slot = self._descriptors.slot
        found = (
            IrqVector(
                index=index,
                vector=number,
                trigger=slot(entry.trigger),
                on_mask=slot(entry.on_mask),
                on_unmask=slot(entry.on_unmask),
                masked=entry.masked,
            )
            for index, entries in enumerate(self._vectors)
            for number, entry in enumerate(entries)
        )
        return tuple(v for v in found if v != IrqVector(index=v.index, vector=v.vector))

    def check_client(self, vectors: Sequence[IrqVector], fds: Mapping[int, int]) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` unless :meth:`restore_client` can work."""
        self._check_vectors([(v.index, v.vector) for v in vectors])
        for vector in vectors:
            for slot in (vector.trigger, vector.on_mask, vector.on_unmask):
                require(slot is None or _is_eventfd(fds[slot]), f"slot {slot} is not an eventfd")

    def restore_client(self, vectors: Sequence[IrqVector], fds: Mapping[int, int]) -> None:
        """Take a checked state over; *fds* are duplicated.  Deliver what is due."""
        for vector in vectors:
            entry = self._vectors[vector.index][vector.vector]
            entry.masked = vector.masked
            entry.trigger = self._adopt(vector.trigger, fds)
            entry.on_mask = self._adopt(vector.on_mask, fds)
            entry.on_unmask = self._adopt(vector.on_unmask, fds)
            self._try(vector.index, entry)
        self._watch_unmask()

    def _adopt(self, slot: int | None, fds: Mapping[int, int]) -> int | None:
        return None if slot is None else self._descriptors.adopt(slot, fds[slot])

    def _check_vectors(self, named: Sequence[tuple[int, int]]) -> None:
        require(len(set(named)) == len(named), "a vector twice")
        for index, vector in named:
            known = 0 <= index < PCI_NUM_IRQS and 0 <= vector < self.count(index)
            require(known, f"no vector {vector} of interrupt index {index}")

    # -- delivery ---------------------------------------------------------------------------------

    def _entry(self, index: int, vector: int) -> _Vector:
        if not 0 <= vector < len(self._vectors[index]):
            raise UsageError(f"no vector {vector} of interrupt index {index}")
        return self._vectors[index][vector]

    def _try(self, index: int, entry: _Vector) -> None:
        if index == PciIrq.INTX:
            self._deliver_intx()
        else:
            self._deliver(index, entry)

    def _deliver(self, index: int, entry: _Vector) -> None:
        if index in self._held or entry.masked or entry.barred or entry.trigger is None:
            return
        if entry.pending:
            entry.pending = False
            self._signal(entry.trigger)

    def _deliver_intx(self) -> None:
        for entry in self._vectors[PciIrq.INTX]:
            if self._asserted and not entry.masked and entry.trigger is not None:
                entry.masked = True
                self._signal(entry.trigger)

    def _signal(self, fd: int | None) -> None:
        if fd is not None:
            self.add_one(fd)


def _add_one(fd: int) -> None:
    """Add 1 to an eventfd; one that is full is signalled already."""
    if os.get_blocking(fd) and not _writable(fd):
        return
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        pass


def _consumed(fd: int) -> bool:
    """Return whether the eventfd was signalled; take the signal.  Never blocks."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        os.eventfd_read(fd)
    except BlockingIOError:  # another process was faster
        return False
    return True


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _is_eventfd(fd: int) -> bool:
    """Return whether *fd* is an eventfd: eight bytes written to another file would damage it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False
