# SPDX-License-Identifier: Apache-2.0
"""The function's state for migration: everything that a driver has set, and where its rings stand.

The format is declared in ``virtio_formats.virtio.pci_state``.  A state is checked as a whole before
any of it is taken over, so that a malformed one changes nothing.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vballoon.errors import PeerError
from vballoon.virtio import RingFault, RingRecord
from vballoon.virtqueue import RingState
from vfio_user import RequestError
from virtio_formats.vfio_user import PciIrq
from virtio_formats.virtio.pci import NO_VECTOR, IsrStatus
from virtio_formats.virtio.pci_state import (
    FUNCTION_MAGIC,
    FUNCTION_VERSION,
    FunctionState,
    QueueState,
    VectorFlag,
)
from virtio_formats.virtio.status import DeviceStatus
from virtio_formats.wire import WireError

if TYPE_CHECKING:
    from vballoon.virtio_pci.function import VirtioPciFunction
    from vballoon.virtio_pci.registers import QueueRegisters

__all__ = ("load", "save")


def save(function: VirtioPciFunction) -> bytes:
    """The state of *function*, whose queues are down."""
    registers = function.registers
    pending = function.irqs.pending(PciIrq.MSIX)
    vectors = bytes(
        VectorFlag.PENDING * waits | VectorFlag.KEPT * (vector in function.msix.kept)
        for vector, waits in enumerate(pending)
    )
    table, own = function.msix.table, function.device.save()
    head = FunctionState(
        config_size=function.config.size,
        msix_size=len(table),
        vectors=len(vectors),
        num_queues=len(registers.queues),
        device_size=len(own),
        device_status=int(registers.status),
        config_generation=function.generation(),
        isr=int(function.interrupts.isr),
        **registers.selection(),
    )
    queues = b"".join(_queue(function, index).build() for index in range(len(registers.queues)))
    return b"".join((head.build(), bytes(function.config.data), table, vectors, queues, own))


def _queue(function: VirtioPciFunction, index: int) -> QueueState:
    queue, record = function.registers.queues[index], function.rings.record(index)
    at = record.position or RingState()
    return QueueState(
        desc=queue.desc,
        driver=queue.driver,
        device=queue.device,
        size=queue.size,
        vector=queue.vector,
        enable=queue.enable,
        avail=at.avail,
        used=at.used,
        avail_wrap=at.avail_wrap,
        used_wrap=at.used_wrap,
        ran=record.position is not None,
        broken=record.broken is not None,
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """A state, cut up and checked."""

    head: FunctionState
    config: bytes
    msix: bytes
    vectors: bytes
    queues: list[QueueState]
    own: bytes


def load(function: VirtioPciFunction, state: bytes) -> None:
    """Take *state* over; raises :class:`~vfio_user.RequestError` EINVAL, nothing changed then."""
    try:
        parts = _cut(state)
        _check(function, parts)
        function.device.load(parts.own)
    except (WireError, PeerError) as error:
        raise RequestError(errno.EINVAL, f"device state: {error}") from None
    function.config.restore(parts.config)
    kept = {i for i, flags in enumerate(parts.vectors) if flags & VectorFlag.KEPT}
    function.msix.restore(parts.msix, kept)
    function.registers.restore(parts.head)
    function.interrupts.restore(IsrStatus(parts.head.isr))
    for vector, flags in enumerate(parts.vectors):
        if flags & VectorFlag.PENDING:
            function.irqs.trigger(PciIrq.MSIX, vector)
    function.rings.restore([_record(queue) for queue in parts.queues])
    for queue, saved in zip(function.registers.queues, parts.queues, strict=True):
        _restore_queue(queue, saved)
    function.restored(parts.head.config_generation)


def _restore_queue(queue: QueueRegisters, saved: QueueState) -> None:
    queue.desc, queue.driver, queue.device = saved.desc, saved.driver, saved.device
    queue.size, queue.vector, queue.enable = saved.size, saved.vector, saved.enable
    queue.resetting = False


def _record(saved: QueueState) -> RingRecord:
    position = RingState(saved.avail, saved.used, bool(saved.avail_wrap), bool(saved.used_wrap))
    fault = RingFault("broken-before", "when the guest was moved here")
    return RingRecord(
        position=position if saved.ran else None, broken=fault if saved.broken else None
    )


def _cut(state: bytes) -> _Parts:
    head = FunctionState.parse(state[: FunctionState.SIZE])
    _require(
        head.magic == FUNCTION_MAGIC and head.version == FUNCTION_VERSION,
        "not the state of a vballoon function, or a newer one's",
    )
    at, pieces = FunctionState.SIZE, []
    sizes = (head.config_size, head.msix_size, head.vectors)
    for size in (*sizes, head.num_queues * QueueState.SIZE, head.device_size):
        pieces.append(state[at : at + size])
        at += size
    _require(at == len(state), f"{len(state)} bytes where {at} are due")
    config, msix, vectors, queues, own = pieces
    size = QueueState.SIZE
    found = [QueueState.parse(queues[i : i + size]) for i in range(0, len(queues), size)]
    return _Parts(head, config, msix, vectors, found, own)


def _check(function: VirtioPciFunction, parts: _Parts) -> None:
    """The state has to be one that a driver could have brought this very function into."""
    registers, head = function.registers, parts.head
    ours = (function.config.size, len(function.msix.table), len(registers.queues))
    theirs = (head.config_size, head.msix_size, head.num_queues)
    vectors = function.irqs.count(PciIrq.MSIX)
    _require(ours == theirs and head.vectors == vectors, f"of another function: {theirs}")
    _require(
        parts.config[:4] == bytes(function.config.data[:4]), "of another vendor's or another device"
    )
    status = DeviceStatus(head.device_status)
    unknown = head.driver_features & ~registers.offered
    _require(
        not unknown or not status & DeviceStatus.FEATURES_OK,
        f"negotiated features that are not offered here: {unknown:#x}",
    )
    _require(
        bool(status & DeviceStatus.FEATURES_OK) or not status & DeviceStatus.DRIVER_OK,
        "DRIVER_OK without FEATURES_OK",
    )
    for vector in (head.config_msix_vector, *(q.vector for q in parts.queues)):
        _require(vector < vectors or vector == NO_VECTOR, f"no vector {vector}")
    for queue, known in zip(parts.queues, registers.queues, strict=True):
        _require(0 < queue.size <= known.size_max and queue.enable <= 1, f"a queue of {queue.size}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RequestError(errno.EINVAL, f"device state: {otherwise}")
