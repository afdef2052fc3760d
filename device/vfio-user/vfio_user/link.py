# SPDX-License-Identifier: Apache-2.0
"""The shared state of one connection: limits, capabilities, the outbox, and how it ended.

The command handlers and the server's own DMA messages both need these and nothing else of a
session, so this module imports neither of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_user.stream import HEADER
from virtio_formats.vfio_user import Capabilities, Header

if TYPE_CHECKING:
    from vfio_user.dma import DmaChannel

__all__ = ("Link", "Output", "SessionLimits")

log = logging.getLogger(__name__)

Output = list[tuple[bytes, list[int]]]


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """Limits of what the server keeps for one client."""

    max_msg_fds: int = 16
    """Descriptors in one message. QEMU 11.1 rejects a reply that offers more than 16."""
    max_data_xfer_size: int = 1 << 20
    """Bytes of data in one message: the default of the specification."""
    max_dma_maps: int = 65535
    """DMA regions: the default of the specification; each costs about a kilobyte."""
    max_queued: int = 1024
    """Commands that wait while the device waits for client memory. QEMU has two dozen threads."""

    @property
    def max_message(self) -> int:
        """Maximum size of a message in bytes: the data and the fixed parts."""
        return self.max_data_xfer_size + 4096


class Link:
    """The negotiated properties, the outbox and the end of one connection.

    *open_twin()* makes a socket pair for server commands, keeps the server's end and returns the
    descriptor of the client's end.
    """

    def __init__(self, limits: SessionLimits, open_twin: Callable[[], int] | None = None) -> None:
        self.limits = limits
        self.client: Capabilities | None = None
        """The client's capabilities; None until it has negotiated."""
        self.twin = False
        """Whether server commands go over the twin socket."""
        self.channel: DmaChannel | None = None
        """Carries DMA_READ and DMA_WRITE to this client."""
        self.error: str | None = None
        """Why the connection had to be closed; None for an orderly end."""
        self.is_open = True
        self.open_twin = open_twin
        self._output: Output = []
        self._twin_output: Output = []

    @property
    def transfer_limit(self) -> int:
        """Return the bytes of data that both sides accept in one DMA or region access."""
        ours = self.limits.max_data_xfer_size
        return min(ours, self.client.max_data_xfer_size) if self.client else ours

    def close(self, error: str | None = None) -> None:
        """End the connection; the first *error* is kept."""
        if not self.is_open:
            return
        self.is_open = False
        self.error = error
        if error is not None:
            log.warning("closing the connection: %s", error)

    def send(
        self,
        command: int,
        payload: bytes,
        fds: list[int],
        *,
        msg_id: int,
        flags: int,
        error: int = 0,
        twin: bool = False,
    ) -> None:
        """Queue a message, on the socket for server commands if *twin*, and own *fds*."""
        head = HEADER.pack(msg_id, command, Header.SIZE + len(payload), flags, error)
        (self._twin_output if twin else self._output).append((head + payload, fds))

    def take_output(self) -> Output:
        """Return what to send now, in order; the caller owns the descriptors."""
        output, self._output = self._output, []
        return output

    def take_twin_output(self) -> Output:
        """Return what to send now on the socket for server commands."""
        output, self._twin_output = self._twin_output, []
        return output
