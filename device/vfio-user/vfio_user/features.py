# SPDX-License-Identifier: Apache-2.0
"""Serve DEVICE_FEATURE: migration states and DMA logging.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DEVICE_FEATURE``.  One table holds the methods of
each feature, so that a probe and a call cannot disagree.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio_user.dirty import MAX_LOG_RANGES
from vfio_user.errors import RequestError
from virtio_formats.vfio_user import (
    DeviceFeature,
    Feature,
    FeatureFlags,
    LoggingControl,
    LoggingRange,
    LoggingReport,
    Migration,
    MigrationFlags,
    MigState,
)

if TYPE_CHECKING:
    from vfio_user.device import PciDevice
    from vfio_user.steps import Steps

__all__ = ("changes", "handle")

# Plain integers: ~ of a flag would lose the bits that have no name.
_GET, _SET, _PROBE = int(FeatureFlags.GET), int(FeatureFlags.SET), int(FeatureFlags.PROBE)
_INDEX = int(FeatureFlags.INDEX_MASK)
_METHODS = _GET | _SET


def changes(payload: bytes) -> bool:
    """Return whether a DEVICE_FEATURE request changes the device: SET, and no PROBE."""
    if len(payload) < DeviceFeature.SIZE:
        return False
    flags = DeviceFeature.parse(payload[: DeviceFeature.SIZE]).flags
    return flags & _SET != 0 and flags & _PROBE == 0


def handle(device: PciDevice, payload: bytes, *, limit: int) -> Steps[bytes]:
    """Serve one DEVICE_FEATURE request; return the reply's payload.

    *limit* is how many bytes of bitmap a reply may carry.  Raise
    :class:`~vfio_user.errors.RequestError` EINVAL for a feature or a method that the device does
    not have, and for sizes that do not fit.
    """
    head = DeviceFeature.parse(payload[: DeviceFeature.SIZE])
    data = payload[DeviceFeature.SIZE :]
    methods, serve = _FEATURES.get(head.flags & _INDEX, (0, None))
    asked = head.flags & ~_INDEX
    wanted = asked & _METHODS
    if serve is None or asked & ~(_METHODS | _PROBE) or wanted & ~methods:
        raise RequestError(errno.EINVAL, f"DEVICE_FEATURE {head.flags:#x}")
    if serve in _MIGRATION and not device.migratable:
        raise RequestError(errno.EINVAL, "the device does not migrate")
    if head.argsz < DeviceFeature.SIZE:
        raise RequestError(errno.EINVAL, f"argsz {head.argsz}")
    if asked & _PROBE:
        return payload
    if wanted not in (_GET, _SET):
        raise RequestError(errno.EINVAL, "DEVICE_FEATURE with no method, or with two")
    answer = serve(device, data, wanted == _SET, min(limit, head.argsz))
    if not isinstance(answer, bytes):
        answer = yield from answer
    if head.argsz < DeviceFeature.SIZE + len(answer):
        raise RequestError(errno.EINVAL, f"argsz {head.argsz} for {len(answer)} bytes")
    size = DeviceFeature.SIZE + len(answer) if wanted == _GET else head.argsz
    return DeviceFeature(argsz=size, flags=head.flags).build() + answer


def _migration(device: PciDevice, data: bytes, set_it: bool, room: int) -> bytes:
    return Migration(flags=MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY).build()


def _mig_device_state(
    device: PciDevice, data: bytes, set_it: bool, room: int
) -> bytes | Steps[bytes]:
    if set_it:
        request = MigState.parse(data)
        if room < DeviceFeature.SIZE + MigState.SIZE:
            raise RequestError(errno.EINVAL, "argsz without room for the state")
        return _set_state(device, request.device_state, data)
    return MigState(device_state=device.migration.state, data_fd=0).build()


def _set_state(device: PciDevice, state: int, data: bytes) -> Steps[bytes]:
    yield from device.migration.walk(state)
    return data


def _logging_start(device: PciDevice, data: bytes, set_it: bool, room: int) -> bytes:
    head, ranges = _control(data)
    page_size = device.dma.log.start(head.page_size, ranges)
    device.dma_logging(True)
    chosen = LoggingControl(page_size=page_size, num_ranges=head.num_ranges, reserved=0)
    return chosen.build() + data[LoggingControl.SIZE :]


def _logging_stop(device: PciDevice, data: bytes, set_it: bool, room: int) -> bytes:
    if data:  # Linux's VFIO has no data here, the specification has
        _control(data)
    device.stop_logging()
    return data


def _logging_report(device: PciDevice, data: bytes, set_it: bool, room: int) -> bytes:
    request = LoggingReport.parse(data)
    space = room - DeviceFeature.SIZE - LoggingReport.SIZE
    bitmap = device.dma.log.report(request.iova, request.length, request.page_size, space)
    return data + bitmap


def _control(data: bytes) -> tuple[LoggingControl, list[LoggingRange]]:
    head = LoggingControl.parse(data[: LoggingControl.SIZE])
    body, size = data[LoggingControl.SIZE :], LoggingRange.SIZE
    if head.num_ranges > MAX_LOG_RANGES or len(body) != head.num_ranges * size:
        raise RequestError(errno.EINVAL, f"{head.num_ranges} ranges in {len(body)} bytes")
    return head, [LoggingRange.parse(body[at : at + size]) for at in range(0, len(body), size)]


Server = Callable[["PciDevice", bytes, bool, int], "bytes | Steps[bytes]"]

_MIGRATION: tuple[Server, ...] = (_migration, _mig_device_state)

_FEATURES: dict[int, tuple[int, Server]] = {
    Feature.MIGRATION: (_GET, _migration),
    Feature.MIG_DEVICE_STATE: (_GET | _SET, _mig_device_state),
    Feature.DMA_LOGGING_START: (_SET, _logging_start),
    Feature.DMA_LOGGING_STOP: (_SET, _logging_stop),
    Feature.DMA_LOGGING_REPORT: (_GET, _logging_report),
}
"""Feature to the methods it has, and the function that serves them."""
