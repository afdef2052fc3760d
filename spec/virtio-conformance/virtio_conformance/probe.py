# SPDX-License-Identifier: Apache-2.0
"""One connection before any test: is there a back-end that speaks the protocol, what is offered?

Whatever goes wrong here is no fault of the back-end's: the command line may be wrong, the program
may not be installed.  The run then ends with one line.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from virtio_conformance.findings import Closed, Finding, Hang, NotStarted
from virtio_conformance.target import Options, Target
from virtio_conformance.vfio_user import Client
from virtio_conformance.vhost_user import FrontEnd
from virtio_conformance.virtio_pci import VirtioPci
from virtio_formats.vhost_user.features import VhostFeature
from virtio_formats.vhost_user.requests import Request

__all__ = ("Facts", "probe")

SOCKET_LIMIT = 1.0
"""Seconds that a socket named on the command line may take to be there."""


@dataclass(frozen=True)
class Facts:
    """What the back-end says of itself."""

    features: int = 0
    protocol_features: int = 0


@cache
def probe(options: Options) -> Facts:
    """Connect once and return what is offered; raise :class:`NotStarted` with one line."""
    if options.socket and not Path(options.socket).exists():
        raise NotStarted(f"{options.socket}: no such socket")
    target = Target(options)
    try:
        facts = _ask(target)
        if options.socket:
            _expect_another(target)
        return facts
    except (Finding, OSError, ValueError) as finding:
        raise NotStarted(_why(target, finding)) from None
    finally:
        target.stop()


def _ask(target: Target) -> Facts:
    options = target.options
    if options.protocol == "vfio-user":
        client = Client(target.connect(_limit(options)), options.start_limit)
        with contextlib.closing(client):
            client.negotiate()
            with contextlib.suppress(Finding):  # a PCI device that is no virtio device
                return Facts(VirtioPci(client).device_features())
            return Facts()
    front_end = FrontEnd(target.connect(_limit(options)), options.start_limit)
    with contextlib.closing(front_end):
        features = front_end.get_u64(Request.GET_FEATURES)
        if not features & VhostFeature.PROTOCOL_FEATURES:
            return Facts(features)
        return Facts(features, front_end.get_u64(Request.GET_PROTOCOL_FEATURES))


def _limit(options: Options) -> float:
    return min(options.start_limit, SOCKET_LIMIT) if options.socket else options.start_limit


def _expect_another(target: Target) -> None:
    """Raise :class:`NotStarted` for a socket that serves a single connection."""
    try:
        target.connect().close()
    except (Finding, OSError):
        raise NotStarted(
            f"{target.socket}: the back-end serves one connection and ends; give its command"
            " with --spawn"
        ) from None


def _why(target: Target, finding: Exception) -> str:
    """Return one line for people, without the folder that was made for the program."""
    where = target.options.command or target.socket
    protocol = target.options.protocol
    if isinstance(finding, Hang) and target.connections:
        return f"{where}: no answer within {target.options.start_limit:g} s; is it {protocol}?"
    if target.popen is not None and target.ends_within(0.2):
        ended = " ".join(target.how_it_ended().replace("\n  |", " |").split())
        return target.plain(f"{where}: the program ended before it served {{socket}}: {ended}")
    if not target.connections:
        wait = target.options.start_limit if target.options.command else SOCKET_LIMIT
        return f"{where}: nobody listens on the socket within {wait:g} s"
    if isinstance(finding, Closed):
        return f"{where}: the connection is closed at the first message; is it {protocol}?"
    return f"{where}: the first answer is not {protocol}: {str(finding).splitlines()[0]}"
