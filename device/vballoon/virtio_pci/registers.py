# SPDX-License-Identifier: Apache-2.0
"""The common configuration structure: what the driver reads and writes to set the device up.

Virtio 1.4, *Common configuration structure layout*, *Device Initialization*, *Device Reset*,
*Virtqueue Reset*.  The registers know no queue and no device: what a write starts is reported to a
:class:`Listener`, which answers later by changing the registers.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Protocol

from vfio_user import RequestError
from virtio_formats.virtio import features as f
from virtio_formats.virtio.pci import NO_VECTOR, CommonConfig
from virtio_formats.virtio.status import DeviceStatus

__all__ = ("CommonRegisters", "Listener", "QueueRegisters", "QueueValue", "RegistersValue")

log = logging.getLogger(__name__)

_FIELDS = {
    name: (int(offset), dtype.itemsize)
    for name, (dtype, offset, *_) in (CommonConfig.dtype().fields or {}).items()
}
_AT = {offset: name for name, (offset, _) in _FIELDS.items()}
_HALF = 4


@dataclass(slots=True)
class QueueRegisters:
    """What the driver has said about one queue; addresses are guest-physical."""

    size_max: int
    size: int
    vector: int = NO_VECTOR
    enable: int = 0
    desc: int = 0
    driver: int = 0
    device: int = 0
    resetting: bool = False

    def reset(self) -> None:
        """As after a device reset."""
        self.size, self.vector, self.enable = self.size_max, NO_VECTOR, 0
        self.desc = self.driver = self.device = 0
        self.resetting = False


@dataclass(frozen=True, slots=True)
class QueueValue:
    """The registers of one queue as a value."""

    desc: int
    driver: int
    device: int
    size: int
    vector: int
    enable: int
    resetting: bool


@dataclass(frozen=True, slots=True)
class RegistersValue:
    """The registers as a value."""

    status: int
    driver_features: int
    config_vector: int
    device_select: int
    driver_select: int
    queue_select: int
    queues: tuple[QueueValue, ...]


class Listener(Protocol):
    """Who acts on what the driver writes."""

    def device_reset(self) -> None:
        """0 was written to device_status."""

    def driver_ok(self) -> None:
        """DRIVER_OK has been set."""

    def queue_enabled(self, index: int) -> None:
        """queue_enable was written for a queue."""

    def queue_reset(self, index: int) -> None:
        """Handle queue_reset of a queue; clear ``resetting`` when it is done."""

    def generation(self) -> int:
        """config_generation as it is now."""

    def refusal(self) -> str | None:
        """Return why no driver can be served now, or None."""


class CommonRegisters:
    """The registers.  *offered* is the 64-bit feature word, *vectors* the size of the MSI-X table.

    Accesses are of a whole field, or of half a 64-bit one; anything else is refused (the driver
    must not do it, and what it would mean is not said).
    """

    def __init__(
        self, *, offered: int, queues: int, size_max: int, vectors: int, listener: Listener
    ) -> None:
        self.offered = offered
        self.status = DeviceStatus(0)
        self.driver_features = 0
        self.config_vector = NO_VECTOR
        self.queues = [QueueRegisters(size_max, size_max) for _ in range(queues)]
        self._vectors = vectors
        self._listener = listener
        self._device_select = self._driver_select = self._queue_select = 0

    def reset(self) -> None:
        """As after power-on."""
        self.status = DeviceStatus(0)
        self.driver_features = 0
        self.config_vector = NO_VECTOR
        self._device_select = self._driver_select = self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    def state(self) -> RegistersValue:
        """Return the registers as a value."""
        return RegistersValue(
            status=int(self.status),
            driver_features=self.driver_features,
            config_vector=self.config_vector,
            device_select=self._device_select,
            driver_select=self._driver_select,
            queue_select=self._queue_select,
            queues=tuple(
                QueueValue(q.desc, q.driver, q.device, q.size, q.vector, q.enable, q.resetting)
                for q in self.queues
            ),
        )

    def check(self, value: RegistersValue) -> None:
        """Check that a driver could have brought these registers to *value*.

        Raise :class:`~vfio_user.RequestError` EINVAL.
        """
        status = DeviceStatus(value.status)
        agreed = bool(status & DeviceStatus.FEATURES_OK)
        unknown = value.driver_features & ~self.offered
        _require(not unknown or not agreed, f"features that are not offered: {unknown:#x}")
        _require(agreed or not status & DeviceStatus.DRIVER_OK, "DRIVER_OK without FEATURES_OK")
        _require(len(value.queues) == len(self.queues), f"{len(value.queues)} queues")
        for vector in (value.config_vector, *(q.vector for q in value.queues)):
            _require(vector == self._usable(vector), f"no vector {vector}")
        for queue, known in zip(value.queues, self.queues, strict=True):
            _require(0 < queue.size <= known.size_max, f"a queue of {queue.size}")
            _require(queue.enable <= 1, f"queue_enable {queue.enable}")

    def restore(self, value: RegistersValue) -> None:
        """Take over a *value* that has been checked."""
        self.status = DeviceStatus(value.status)
        self.driver_features = value.driver_features
        self.config_vector = value.config_vector
        self._device_select = value.device_select
        self._driver_select = value.driver_select
        self._queue_select = value.queue_select
        for queue, saved in zip(self.queues, value.queues, strict=True):
            queue.desc, queue.driver, queue.device = saved.desc, saved.driver, saved.device
            queue.size, queue.vector, queue.enable = saved.size, saved.vector, saved.enable
            queue.resetting = saved.resetting

    @property
    def features(self) -> int:
        """The negotiated features; 0 until FEATURES_OK."""
        return self.driver_features if self.status & DeviceStatus.FEATURES_OK else 0

    @property
    def running(self) -> bool:
        """Whether the driver has said DRIVER_OK."""
        return bool(self.status & DeviceStatus.DRIVER_OK)

    # -- access -----------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """*count* bytes at *offset*; raises :class:`~vfio_user.RequestError` EINVAL."""
        name, shift, size = _field(offset, count)
        value = int(getattr(self, f"_get_{name}")()) >> shift
        return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Store *data* at *offset*; raises :class:`~vfio_user.RequestError` EINVAL.

        Writes of read-only fields, and values that are not allowed, change nothing.
        """
        name, shift, size = _field(offset, len(data))
        value = int.from_bytes(data, "little")
        if name in _ADDRESSES:
            self._set_address(_ADDRESSES[name], value, shift, size)
        elif name in _WRITERS:
            getattr(self, f"_set_{name}")(value)

    @property
    def _queue(self) -> QueueRegisters | None:
        """The selected queue, if there is such a one."""
        index = self._queue_select
        return self.queues[index] if index < len(self.queues) else None

    # -- the device -------------------------------------------------------------------------------

    def _get_device_feature_select(self) -> int:
        return self._device_select

    def _set_device_feature_select(self, value: int) -> None:
        self._device_select = value

    def _get_device_feature(self) -> int:
        return self.offered >> 32 * self._device_select if self._device_select < 2 else 0

    def _get_driver_feature_select(self) -> int:
        return self._driver_select

    def _set_driver_feature_select(self, value: int) -> None:
        self._driver_select = value

    def _get_driver_feature(self) -> int:
        return self.driver_features >> 32 * self._driver_select if self._driver_select < 2 else 0

    def _set_driver_feature(self, value: int) -> None:
        if self._driver_select < 2 and not self.status & DeviceStatus.FEATURES_OK:
            shift = 32 * self._driver_select
            self.driver_features &= ~(0xFFFFFFFF << shift)
            self.driver_features |= value << shift

    def _get_config_msix_vector(self) -> int:
        return self.config_vector

    def _set_config_msix_vector(self, value: int) -> None:
        self.config_vector = self._usable(value)

    def _usable(self, vector: int) -> int:
        """*MSI-X Vector Configuration*: what cannot be mapped reads back as NO_VECTOR."""
        return vector if vector < self._vectors else NO_VECTOR

    def _get_num_queues(self) -> int:
        return len(self.queues)

    def _get_config_generation(self) -> int:
        return self._listener.generation()

    def _get_device_status(self) -> int:
        return self.status

    def _set_device_status(self, value: int) -> None:
        if value == 0:
            self._listener.device_reset()
            return
        new = DeviceStatus(value) & ~DeviceStatus.NEEDS_RESET & ~self.status
        if new & DeviceStatus.FEATURES_OK and not self._acceptable():
            new &= ~DeviceStatus.FEATURES_OK
        if not (self.status | new) & DeviceStatus.FEATURES_OK:
            new &= ~DeviceStatus.DRIVER_OK
        self.status |= new
        if new & DeviceStatus.DRIVER_OK:
            self._listener.driver_ok()

    def _acceptable(self) -> bool:
        """*Device Initialization*: whether FEATURES_OK may stay set."""
        refusal = self._listener.refusal()
        if refusal is not None:
            log.error("FEATURES_OK refused: %s", refusal)
            return False
        unknown = self.driver_features & ~self.offered
        return not unknown and f.has(self.driver_features, f.VIRTIO_F_VERSION_1)

    # -- the selected queue -----------------------------------------------------------------------

    def _get_queue_select(self) -> int:
        return self._queue_select

    def _set_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _get_queue_size(self) -> int:
        return self._queue.size if self._queue else 0

    def _set_queue_size(self, value: int) -> None:
        queue = self._queue
        packed = f.has(self.driver_features, f.VIRTIO_F_RING_PACKED)
        if queue is None or queue.enable or not 0 < value <= queue.size_max:
            return
        if packed or not value & (value - 1):
            queue.size = value

    def _get_queue_msix_vector(self) -> int:
        return self._queue.vector if self._queue else NO_VECTOR

    def _set_queue_msix_vector(self, value: int) -> None:
        if self._queue is not None:
            self._queue.vector = self._usable(value)

    def _get_queue_enable(self) -> int:
        return self._queue.enable if self._queue else 0

    def _set_queue_enable(self, value: int) -> None:
        queue = self._queue
        if queue is not None and value == 1 and not queue.enable and not queue.resetting:
            queue.enable = 1
            self._listener.queue_enabled(self._queue_select)

    def _get_queue_notify_off(self) -> int:
        return self._queue_select if self._queue else 0

    def _set_address(self, name: str, value: int, shift: int, size: int) -> None:
        queue = self._queue
        if queue is None or queue.enable:
            return
        mask = ((1 << 8 * size) - 1) << shift
        setattr(queue, name, getattr(queue, name) & ~mask | value << shift)

    def _get_queue_desc(self) -> int:
        return self._queue.desc if self._queue else 0

    def _get_queue_driver(self) -> int:
        return self._queue.driver if self._queue else 0

    def _get_queue_device(self) -> int:
        return self._queue.device if self._queue else 0

    def _get_queue_notif_config_data(self) -> int:
        return self._queue_select if self._queue else 0

    def _get_queue_reset(self) -> int:
        return self._queue.resetting if self._queue else 0

    def _set_queue_reset(self, value: int) -> None:
        queue = self._queue
        if queue is None or value != 1 or queue.resetting:
            return
        if f.has(self.features, f.VIRTIO_F_RING_RESET):
            queue.resetting = True
            self._listener.queue_reset(self._queue_select)

    def _get_admin_queue_index(self) -> int:
        return 0

    def _get_admin_queue_num(self) -> int:
        return 0


_ADDRESSES = {"queue_desc": "desc", "queue_driver": "driver", "queue_device": "device"}
_WRITERS = frozenset(
    name.removeprefix("_set_") for name in vars(CommonRegisters) if name.startswith("_set_")
)


def _field(offset: int, count: int) -> tuple[str, int, int]:
    """Return the field of an access, the bits to shift it by, and the bytes."""
    for start, shift in ((offset, 0), (offset - _HALF, 8 * _HALF)):
        name = _AT.get(start)
        size = _FIELDS[name][1] if name is not None else 0
        if name is not None and (
            (count == size and not shift) or (size == 2 * _HALF and count == _HALF)
        ):
            return name, shift, count
    raise RequestError(errno.EINVAL, f"common configuration access {offset:#x}+{count}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RequestError(errno.EINVAL, f"device state: {otherwise}")
