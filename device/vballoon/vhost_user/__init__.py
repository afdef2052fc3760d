# SPDX-License-Identifier: Apache-2.0
"""vhost-user, the back-end side, as QEMU 11.1 speaks it.

``session`` is the protocol without I/O: framing, rules, replies.  ``handlers``, ``config`` and
``transfer`` serve the messages; ``rings``, ``vring``, ``memtable``, ``dirty`` and ``inflight`` hold
what the messages set up.  ``backend`` puts these together.  ``shell`` and ``server`` do the I/O.
"""

from __future__ import annotations

from vballoon.vhost_user.backend import (
    DEFAULT_RING_FEATURES,
    PROTOCOL_FEATURES,
    VhostUserBackend,
)
from vballoon.vhost_user.server import VhostUserServer
from vballoon.vhost_user.session import Session

__all__ = (
    "DEFAULT_RING_FEATURES",
    "PROTOCOL_FEATURES",
    "Session",
    "VhostUserBackend",
    "VhostUserServer",
)
