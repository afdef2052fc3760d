# SPDX-License-Identifier: Apache-2.0
"""The operator's socket: QMP, the dialect that QEMU's users and tools already speak.

``session`` is the protocol without a socket, ``commands`` the table of what can be asked,
``server`` the shell around them, ``client`` the other end for programs that block.  Only the
client is loaded with the package: a command line must not wait for the server's imports.
"""

from __future__ import annotations

from vballoon.control.client import ControlClient

__all__ = ("ControlClient",)
