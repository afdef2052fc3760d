# SPDX-License-Identifier: Apache-2.0
"""Build and check the messages of systemd's notification protocol (sd_notify(3)).

A service hands descriptors to its supervisor and gets them back when it is started again:
``FDSTORE=1``, ``FDNAME=``, ``FDPOLL=0``, ``FDSTOREREMOVE=1``, ``BARRIER=1``; it reports with
``READY=1``, ``STATUS=``, ``WATCHDOG=1``, ``RELOADING=1``, ``STOPPING=1``.  A worker speaks it to
the keeper, and the keeper to systemd.

Whoever sends is not trusted: a datagram that breaks a limit raises :class:`NotifyError` and is
dropped whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from vballoon.errors import PeerError

__all__ = (
    "DATAGRAM_MAX",
    "FDS_MAX",
    "NAME_MAX",
    "Notification",
    "NotifyError",
    "build_barrier",
    "build_remove",
    "build_store",
    "is_name",
    "parse",
)

DATAGRAM_MAX = 4096
"""Bytes of one datagram; systemd reads no more (``NOTIFY_BUFFER_MAX``)."""
FDS_MAX = 253
"""Descriptors with one datagram (``SCM_MAX_FD`` of the Linux kernel)."""
NAME_MAX = 255
"""Characters of a name (sd_pid_notify_with_fds(3))."""
STATUS_MAX = 512
"""Characters of a status text that are kept."""

_FLAGS = {
    "FDSTORE": "store",
    "FDSTOREREMOVE": "remove",
    "BARRIER": "barrier",
    "READY": "ready",
    "RELOADING": "reloading",
    "STOPPING": "stopping",
    "WATCHDOG": "watchdog",
}


class NotifyError(PeerError):
    """A notification that breaks the protocol or a limit."""


@dataclass(frozen=True, slots=True)
class Notification:
    """One datagram.  *name* is that of the descriptors which come with it or are to be removed."""

    store: bool = False
    remove: bool = False
    barrier: bool = False
    ready: bool = False
    reloading: bool = False
    stopping: bool = False
    watchdog: bool = False
    name: str = "stored"
    poll: bool = True
    status: str | None = None


def is_name(name: str) -> bool:
    """Return whether *name* may name a descriptor: printable ASCII, no colon, not too long."""
    return 0 < len(name) <= NAME_MAX and all(" " <= c < "\x7f" and c != ":" for c in name)


def parse(data: bytes, fds: int) -> Notification:
    """Return what the datagram *data* with *fds* descriptors says.  Raise NotifyError.

    Assignments that are not known are ignored, as systemd ignores them.
    """
    if len(data) > DATAGRAM_MAX:
        raise NotifyError("notify-size", f"more than {DATAGRAM_MAX} bytes")
    if fds > FDS_MAX:
        raise NotifyError("notify-fds", f"{fds} descriptors, at most {FDS_MAX}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise NotifyError("notify-text", "not UTF-8") from None
    fields: dict[str, bool | str] = {}
    for line in text.split("\n"):
        key, _, value = line.partition("=")
        if key in _FLAGS:
            fields[_FLAGS[key]] = value == "1"
        elif key == "FDNAME":
            if not is_name(value):
                raise NotifyError("notify-name", "not a name for a descriptor")
            fields["name"] = value
        elif key == "FDPOLL":
            fields["poll"] = value != "0"
        elif key == "STATUS":
            fields["status"] = "".join(c for c in value if c.isprintable())[:STATUS_MAX]
    return _checked(Notification(**fields), fds)  # type: ignore[arg-type]


def _checked(said: Notification, fds: int) -> Notification:
    """Return *said*.  Raise NotifyError if its descriptors are not those that it needs."""
    if said.barrier and (said.store or said.remove or fds != 1):
        raise NotifyError("notify-barrier", f"{fds} descriptors, or not alone")
    if said.store and said.remove:
        raise NotifyError("notify-store", "FDSTORE and FDSTOREREMOVE at once")
    if said.store and not fds:
        raise NotifyError("notify-fds", "FDSTORE without a descriptor")
    if fds and not (said.store or said.barrier):
        raise NotifyError("notify-fds", f"{fds} descriptors that nothing asked for")
    return said


def build_store(name: str) -> bytes:
    """Return the datagram that stores the descriptors sent along under *name*.

    FDPOLL=0: systemd would otherwise drop a descriptor that reports POLLHUP or POLLERR, and a full
    eventfd does.
    """
    return f"FDSTORE=1\nFDNAME={_name(name)}\nFDPOLL=0".encode()


def build_remove(name: str) -> bytes:
    """Return the datagram that removes every descriptor of this *name* from the store."""
    return f"FDSTOREREMOVE=1\nFDNAME={_name(name)}".encode()


def build_barrier() -> bytes:
    """Return the datagram whose one descriptor is closed once all earlier ones were handled."""
    return b"BARRIER=1"


def _name(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"{name!r} cannot name a descriptor")
    return name
