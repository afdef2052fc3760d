# SPDX-License-Identifier: Apache-2.0
"""The device's configuration space as the front-end reads, writes and is notified of it.

GET_CONFIG, SET_CONFIG, SET_BACKEND_REQ_FD and CONFIG_CHANGE_MSG of vhost-user.rst, QEMU 11.1.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vballoon.errors import ProtocolError
from vballoon.vhost_user.channel import BackendChannel
from vballoon.vhost_user.session import Fds, Handler, Reply
from virtio_formats.vhost_user import MAX_CONFIG_SIZE, ConfigFlag, Request, VhostUserConfig

if TYPE_CHECKING:
    from vballoon.vhost_user.io import ChannelIo, Io
    from vballoon.virtio import VirtioDevice

__all__ = ("Channel", "ConfigAccess", "open_channel")

Channel = tuple[BackendChannel, "ChannelIo"]
"""The back-end channel and its socket."""


def open_channel(io: Io, fd: int) -> Channel:
    """Return a back-end channel on socket *fd*, and take ownership of *fd*.

    Raise :class:`~vballoon.errors.ProtocolError` ``fd-type`` if it is not a socket.
    """
    channel = BackendChannel()
    try:
        return channel, io.open_channel(fd, channel)
    except OSError as error:
        raise ProtocolError("fd-type", f"back-end channel: {error.strerror}") from None


class ConfigAccess:
    """Configuration messages of *device*, and the back-end channel that announces changes."""

    def __init__(self, device: VirtioDevice, io: Io) -> None:
        self._device, self._io = device, io
        self.channel: Channel | None = None
        self.changes = 0
        """Change notifications sent."""
        self.change_due = False
        """Whether a change has not been sent yet."""

    def handlers(self) -> dict[Request, Handler]:
        """Return the handlers by request."""
        return {
            Request.SET_BACKEND_REQ_FD: self.set_backend_req_fd,
            Request.GET_CONFIG: self.get_config,
            Request.SET_CONFIG: self.set_config,
        }

    def set_backend_req_fd(self, _: None, fds: Fds) -> None:
        """Use a new socket for the back-end's own requests."""
        self.set_channel(open_channel(self._io, fds.take()))

    def set_channel(self, channel: Channel) -> None:
        """Send requests on *channel* from now on."""
        if self.channel is not None:
            self.channel[1].cancel()
        self.channel = channel

    def get_config(self, message: VhostUserConfig, _: Fds) -> Reply:
        """Return a part of the configuration space; bytes beyond its end are zero."""
        self._check(message)
        config = self._device.read_config().ljust(MAX_CONFIG_SIZE, b"\0")
        message.region = config[message.offset : message.offset + message.size]
        return Reply(message.build())

    def set_config(self, message: VhostUserConfig, _: Fds) -> None:
        """Store what the driver wrote; the device ignores read-only fields.

        QEMU sends the whole block whenever the driver writes any of it.  Read-only fields then have
        the values that QEMU last read.  Refusing that would fail a correct driver.
        """
        self._check(message)
        if message.flags not in (ConfigFlag.WRITABLE, ConfigFlag.MIGRATION):
            raise ProtocolError("config-flags", f"{message.flags:#x}")
        room = max(0, len(self._device.read_config()) - message.offset)
        if message.region[:room]:
            self._device.write_config(message.offset, message.region[:room])

    def _check(self, message: VhostUserConfig) -> None:
        if message.size != len(message.region):
            raise ProtocolError("config-size", f"{message.size}, {len(message.region)} bytes sent")
        if not 0 < message.size <= MAX_CONFIG_SIZE - message.offset:
            raise ProtocolError("config-range", f"{message.offset}+{message.size}")

    def send_change(self, *, suspended: bool) -> None:
        """Send a pending change notification, unless the device is *suspended*.

        A suspended device sends no messages ("Suspended device state"), so the notification
        waits until the device runs again.
        """
        if self.change_due and not suspended and self.channel is not None:
            self.change_due = False
            self.changes += 1
            channel, channel_io = self.channel
            channel.config_changed()
            channel_io.flush()

    def close(self) -> None:
        """Close the back-end channel."""
        if self.channel is not None:
            self.channel[1].cancel()
