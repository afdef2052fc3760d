# SPDX-License-Identifier: Apache-2.0
"""The control socket, which speaks QMP, the protocol of QEMU's users and tools.

``session`` is the protocol without I/O, ``commands`` the table of commands, ``server`` does the
I/O, and ``client`` is a blocking client.  Importing the package loads only the client, so that a
command line does not wait for the server's imports.
"""

from __future__ import annotations

from vballoon.control.client import ControlClient

__all__ = ("ControlClient",)
