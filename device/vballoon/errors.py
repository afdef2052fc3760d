# SPDX-License-Identifier: Apache-2.0
"""The two families of errors.

::

    VballoonError
    ├── PeerError            the guest or the front-end broke a rule; names the rule
    │   ├── QueueError       that virtqueue stops; everything else goes on
    │   ├── MemoryFault      an address outside guest memory (becomes a QueueError or ProtocolError)
    │   └── ProtocolError    the message is refused, or the connection closed
    └── UsageError           we or the operator asked for something that cannot be done

No byte that a guest or a front-end can write may raise anything outside the first family, and
nothing of the first family leaves the loop that read the byte: it becomes a stopped queue, an
error reply or a closed connection, and one line in the log.
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
    """Anything that this package raises on purpose."""


class PeerError(VballoonError):
    """The other side broke a rule.

    *rule* is a short stable name of the rule (``"desc-chain-loop"``), the same in the log, in the
    ``QUEUE_BROKEN`` event, in the metrics and in the tests.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule
        self.detail = detail


class QueueError(PeerError):
    """A virtqueue broke a rule of the standard: this queue stops, the others go on."""


class MemoryFault(PeerError):
    """A guest-physical range that is not (wholly) guest memory."""


class ProtocolError(PeerError):
    """A message that the protocol does not allow here."""


class UsageError(VballoonError):
    """A request that cannot be carried out; the text says what to do next."""
