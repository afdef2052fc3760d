# SPDX-License-Identifier: Apache-2.0
"""The seam between devices and transports."""

from __future__ import annotations

from vballoon.virtio.device import DeviceQueue, Transport, VirtioDevice

__all__ = ("DeviceQueue", "Transport", "VirtioDevice")
