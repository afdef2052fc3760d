# SPDX-License-Identifier: Apache-2.0
"""A vfio-user server for any PCI device written in Python.

Derive a device from :class:`PciDevice`, describe its configuration space (:class:`ConfigSpace`),
its regions (:class:`Region`) and its interrupts, and serve it with :class:`Server` to QEMU's
``vfio-user-pci``.  The protocol itself is :class:`Session`, a value that knows no socket.  This
package knows nothing of virtio.
"""

from __future__ import annotations

from vfio_user.config import ConfigSpace
from vfio_user.device import PciDevice
from vfio_user.dirty import DmaLog
from vfio_user.dma import DmaChannel, DmaRegion, DmaTable
from vfio_user.errors import DmaError, FatalError, RequestError, UsageError, VfioUserError
from vfio_user.intx import IntxPin
from vfio_user.irqs import IrqTable
from vfio_user.link import SessionLimits
from vfio_user.migration import MigrationMachine
from vfio_user.regions import IoEvent, Region
from vfio_user.run import run_program, serve
from vfio_user.server import Server
from vfio_user.session import Session
from vfio_user.state import BaseState, SessionState

__all__ = (
    "BaseState",
    "ConfigSpace",
    "DmaChannel",
    "DmaError",
    "DmaLog",
    "DmaRegion",
    "DmaTable",
    "FatalError",
    "IntxPin",
    "IoEvent",
    "IrqTable",
    "MigrationMachine",
    "PciDevice",
    "Region",
    "RequestError",
    "Server",
    "Session",
    "SessionLimits",
    "SessionState",
    "UsageError",
    "VfioUserError",
    "run_program",
    "serve",
)
