# SPDX-License-Identifier: Apache-2.0
"""The device status field: how far the driver has come.

Values from the virtio specification, git revision 15f488c1, label
"sec:Basic Facilities of a Virtio Device / Device Status Field".
"""

from __future__ import annotations

import enum

__all__ = ("DeviceStatus",)


class DeviceStatus(enum.IntFlag):
    """Bits of the device status field; 0 resets the device."""

    ACKNOWLEDGE = 1
    """The guest has found the device."""
    DRIVER = 2
    """The guest has a driver for it."""
    DRIVER_OK = 4
    """The driver is set up; the device may use the queues."""
    FEATURES_OK = 8
    """The driver and the device agree on the features."""
    NEEDS_RESET = 64
    """The device has met an error from which only a reset recovers it."""
    FAILED = 128
    """The driver has given up on the device."""
