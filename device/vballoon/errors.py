# SPDX-License-Identifier: Apache-2.0
"""The two families of errors.

::

    VballoonError
    ├── PeerError            the guest or the front-end broke a rule; names the rule
    │   ├── QueueError       that virtqueue stops; the others continue
    │   ├── MemoryFault      an address outside guest memory (becomes a QueueError or ProtocolError)
    │   └── ProtocolError    the message is refused, or the connection closed
    └── UsageError           this program or the operator asked for something impossible

No byte that a guest or a front-end can write may raise anything outside the first family. The
loop that read the byte handles every error of the first family: it stops the queue, sends an error
reply or closes the connection, and logs one line.
"""

from __future__ import annotations

__all__ = (
    "MemoryFault",
    "PeerError",
    "ProtocolError",
    "QueueError",
    "UsageError",
    "VballoonError",
)


class VballoonError(Exception):
    """Base class of every error that this package raises on purpose."""


class PeerError(VballoonError):
    """Report that the guest or the front-end broke a rule.

    *rule* is the rule's short, stable name (``"desc-chain-loop"``). The log, the
    ``QUEUE_BROKEN`` event, the metrics and the tests all use it.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule
        self.detail = detail


class QueueError(PeerError):
    """Report a virtqueue that broke a rule of the standard: it stops, the others continue."""


class MemoryFault(PeerError):
    """Report a guest-physical range that is not entirely inside guest memory."""


class ProtocolError(PeerError):
    """Report a message that the protocol does not allow in the current state."""


class UsageError(VballoonError):
    """Report a request that cannot be carried out; the text says what to do next."""
