# SPDX-License-Identifier: Apache-2.0
"""vhost-user, the backend side, as QEMU 11.1 speaks it.

``session`` is the protocol without I/O: framing, rules, replies.  ``handlers`` says what each
message does, ``backend`` is the transport that the device sees, with ``vring``, ``memtable``,
``inflight`` and ``transfer`` for what they are named after.  ``shell`` and ``server`` do the I/O.
"""

from __future__ import annotations

from vballoon.vhost_user.backend import (
    DEFAULT_RING_FEATURES,
    PROTOCOL_FEATURES,
    VhostUserBackend,
)
from vballoon.vhost_user.io import BackendEvents
from vballoon.vhost_user.server import VhostUserServer
from vballoon.vhost_user.session import Session
from vballoon.vhost_user.status import BackendStatus, QueueStatus, RegionStatus, feature_names

__all__ = (
    "DEFAULT_RING_FEATURES",
    "PROTOCOL_FEATURES",
    "BackendEvents",
    "BackendStatus",
    "QueueStatus",
    "RegionStatus",
    "Session",
    "VhostUserBackend",
    "VhostUserServer",
    "feature_names",
)
