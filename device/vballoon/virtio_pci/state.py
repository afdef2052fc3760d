# SPDX-License-Identifier: Apache-2.0
"""The state of a virtio PCI function as a plain value, and its bytes.

The format is declared in ``virtio_formats.virtio.pci_state``.  Whether a value is one of a given
function is judged by :meth:`~vballoon.virtio_pci.VirtioPciFunction.restore`.
"""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass

from vballoon.errors import ProtocolError
from vballoon.virtio import RingRecord, pack_record, unpack_record
from vballoon.virtio_pci.registers import QueueValue, RegistersValue
from vfio_user import RequestError
from vfio_user.state import BaseState
from virtio_formats.vfio_user.state import seal, unseal
from virtio_formats.virtio.pci_state import FUNCTION_MAGIC, FunctionBody, QueueState
from virtio_formats.virtio.ring_state import RingRecordFormat
from virtio_formats.wire import WireError

__all__ = ("FunctionValue", "pack", "require", "unpack")


@dataclass(frozen=True, kw_only=True)
class FunctionValue:
    """Everything that a driver has set, and where the rings stopped.

    *kept* are the MSI-X vectors whose mask bit in *msix_table* counts; *ran* the queues that the
    device was using, whose position is in guest memory and not in *rings*.
    """

    base: BaseState
    msix_table: bytes
    kept: tuple[int, ...]
    registers: RegistersValue
    rings: tuple[RingRecord, ...]
    ran: tuple[int, ...] = ()
    generation: int = 0
    isr: int = 0
    change_due: bool = False


def pack(value: FunctionValue, device: bytes = b"") -> bytes:
    """Return the bytes of *value*, and of the *device*'s own state with it."""
    registers = value.registers
    body = FunctionBody(
        device_feature_select=registers.device_select,
        driver_features=registers.driver_features,
        driver_feature_select=registers.driver_select,
        queue_select=registers.queue_select,
        config_msix_vector=registers.config_vector,
        device_status=registers.status,
        config_generation=value.generation,
        isr=value.isr,
        change_due=value.change_due,
        base=value.base.pack(),
        msix=value.msix_table,
        kept=list(value.kept),
        queues=[
            {**asdict(queue), "ran": index in value.ran, "reserved": 0}
            for index, queue in enumerate(registers.queues)
        ],
        rings=b"".join(map(pack_record, value.rings)),
        device=device,
    )
    return seal(FUNCTION_MAGIC, body.build())


def unpack(data: bytes) -> tuple[FunctionValue, bytes]:
    """Return the value in *data*, and the device's own state.

    Raise :class:`~vfio_user.RequestError` EINVAL for anything that :func:`pack` of this version
    does not write.
    """
    try:
        body = FunctionBody.parse(unseal(FUNCTION_MAGIC, data))
        value = _value(body)
    except (WireError, ProtocolError) as error:
        raise RequestError(errno.EINVAL, f"device state: {error}") from None
    require(pack(value, body.device) == data, "a field has a value that it cannot have")
    return value, body.device


def _value(body: FunctionBody) -> FunctionValue:
    queues = [QueueState(**queue) for queue in body.queues]
    size = RingRecordFormat.SIZE
    rings = [body.rings[at : at + size] for at in range(0, len(body.rings), size)]
    registers = RegistersValue(
        status=body.device_status,
        driver_features=body.driver_features,
        config_vector=body.config_msix_vector,
        device_select=body.device_feature_select,
        driver_select=body.driver_feature_select,
        queue_select=body.queue_select,
        queues=tuple(
            QueueValue(q.desc, q.driver, q.device, q.size, q.vector, q.enable, bool(q.resetting))
            for q in queues
        ),
    )
    return FunctionValue(
        base=BaseState.unpack(body.base),
        msix_table=body.msix,
        kept=tuple(body.kept),
        registers=registers,
        rings=tuple(map(unpack_record, rings)),
        ran=tuple(index for index, queue in enumerate(queues) if queue.ran),
        generation=body.config_generation,
        isr=body.isr,
        change_due=bool(body.change_due),
    )


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`~vfio_user.RequestError` EINVAL with *otherwise* unless *holds*."""
    if not holds:
        raise RequestError(errno.EINVAL, f"device state: {otherwise}")
