# SPDX-License-Identifier: Apache-2.0
"""Device profiles: one valid request for each device type that the suite knows.

The ring tests know a device only by its profile.  To add one, subclass :class:`Profile`, name the
queues to start, and build a request.  ``docs/conformance.md`` has an example.
"""

from __future__ import annotations

import argparse
import importlib.util
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from virtio_conformance.memory import PAGE, GuestRam
from virtio_formats.virtio.balloon import BalloonPfn

__all__ = (
    "PROFILES",
    "Driver",
    "Exchange",
    "Profile",
    "find_profile",
    "no_bytes",
    "profile_named",
)

FILL = 0xA5
"""The byte that fills device-writable memory before the device writes to it."""


@dataclass
class Exchange:
    """One valid request: the bytes to read, the room to write, and checks of the result."""

    readable: bytes
    writable: int = 0
    """Bytes that the device may write."""
    verify: Callable[[int, bytes], str] = lambda used, data: ""
    """Takes the used length and the device-writable bytes; returns what is wrong, or ``""``."""
    effect: Callable[[], str] = lambda: ""
    """Called after use on the main ring; returns what is wrong in guest memory, or ``""``."""
    may_change: tuple[tuple[int, int], ...] = ()
    """Other guest memory that the device may change, as (start, end) guest-physical addresses."""


class Driver(Protocol):
    """The part of a :class:`~virtio_conformance.rig.Rig` that a profile uses."""

    ram: GuestRam
    notes: dict[str, Any]
    """Values that a profile keeps from one request to the next."""
    frees: bool
    """Whether the device is known to free inflated pages."""

    @property
    def discards(self) -> bool:
        """Whether freed pages are expected to become holes."""

    def run(self, exchanges: Sequence[Exchange]) -> object:
        """Put requests through the main ring and check the results."""


class Profile:
    """A device type without a known request, which is enough to test the control plane."""

    name = "none"
    device_id = 0
    queues: tuple[int, ...] = ()
    """Numbers of the queues to start, in this order."""
    main = 0
    """Number of the queue that requests are put into."""
    other: int | None = None
    """Number of another queue for the same requests, if there is one."""
    features = 0
    """Device-specific features to accept if they are offered, as a mask."""
    known_features = 0xFFFFFF | 0xFFFFFFFF << 50
    """Device-specific bits that the standard defines, as a mask (0: none; default: all)."""
    config_size = 0
    writes = False
    """Whether requests on the main ring have a device-writable part."""
    has_requests = False

    def prepare(self, rig: Driver) -> None:
        """Do what must precede the first request.  The rings run when this is called."""

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return a valid request.  *serial* makes consecutive requests differ."""
        raise NotImplementedError(self.name)


class Balloon(Profile):
    """Traditional memory balloon: inflating one page at a time."""

    name = "balloon"
    device_id = 5
    queues = (0, 1)
    main, other = 0, 1
    known_features = 0b111111 | 1 << 63
    config_size = 16
    has_requests = True
    POOL = 32

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return an inflate buffer with the number of one page."""
        if "balloon" not in rig.notes:
            rig.notes["balloon"] = rig.ram.alloc(self.POOL * PAGE, PAGE, region=1)
        page = rig.notes["balloon"] + serial % self.POOL * PAGE
        rig.ram.write(page, bytes([FILL]) * PAGE)

        def effect() -> str:
            freed = not rig.discards or not rig.frees or rig.ram.is_hole(page)
            return "" if freed else f"the page at {page:#x} was inflated and is still there"

        pfn = BalloonPfn(pfn=page // PAGE).build()
        return Exchange(pfn, verify=no_bytes, effect=effect, may_change=((page, page + PAGE),))


def no_bytes(used: int, data: bytes) -> str:
    """Check a request without a device-writable part: its used length has to be 0."""
    return "" if used == 0 else f"used length {used} for a buffer that nothing is written to"


class Rng(Profile):
    """Entropy source: filling a buffer."""

    name = "rng"
    device_id = 4
    queues = (0,)
    known_features = 0
    writes = has_requests = True

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return a request for 64 bytes of entropy."""
        return Exchange(b"", 64, _random)


def _random(used: int, data: bytes) -> str:
    if not 0 < used <= len(data):
        return f"used length {used} for {len(data)} bytes of entropy"
    if used >= 16 and len(set(data[:used])) == 1:
        return f"{used} bytes of entropy that are all {data[0]:#x}"
    return ""


class Blk(Profile):
    """Block device: reading its first sectors."""

    name = "blk"
    device_id = 2
    queues = (0, 1)
    other = 1
    known_features = 0x3FFFF
    config_size = 8
    writes = has_requests = True
    SECTORS = 8

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return a read of one of the first sectors."""
        header = struct.pack("<IIQ", 0, 0, serial % self.SECTORS)  # VIRTIO_BLK_T_IN
        return Exchange(header, 512 + 1, _sector)


def _sector(used: int, data: bytes) -> str:
    if data[-1] != 0:
        return f"status {data[-1]} for reading a sector"
    return "" if used == len(data) else f"used length {used}, written are {len(data)} bytes"


class Fs(Profile):
    """File system: FUSE requests to the root directory."""

    name = "fs"
    device_id = 26
    queues = (0, 1)
    main = 1
    known_features = 1
    config_size = 40
    writes = has_requests = True
    INIT, STATFS = 26, 17

    def prepare(self, rig: Driver) -> None:
        """Open the file system."""
        body = struct.pack("<IIII", 7, 31, 1 << 16, 0) + bytes(48)
        rig.run([self._fuse(self.INIT, 0, 1, body, 16 + 64)])

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return a STATFS request."""
        return self._fuse(self.STATFS, 1, 2 + serial, b"", 16 + 80)

    def _fuse(self, op: int, node: int, unique: int, body: bytes, room: int) -> Exchange:
        header = struct.pack("<IIQQIIII", 40 + len(body), op, unique, node, 0, 0, 0, 0)

        def verify(used: int, data: bytes) -> str:
            length, error, echoed = struct.unpack_from("<IiQ", data)
            if echoed != unique:
                return f"answer to request {echoed}, asked was {unique}"
            if error:
                return f"FUSE error {error}"
            return "" if used == length else f"used length {used}, the answer says {length}"

        return Exchange(header + body, room, verify)


class Vsock(Profile):
    """Sockets: a connection request to a port that nobody serves."""

    name = "vsock"
    device_id = 19
    queues = (0, 1, 2)
    main = 1
    known_features = 0b111
    config_size = 8
    has_requests = True

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return a connection request to an unused port."""
        cid = int(rig.notes.get("cid", 3))
        packet = struct.pack(
            "<QQIIIHHIII", cid, 2, 1024 + serial % 60000, 4242, 0, 1, 1, 0, 65536, 0
        )
        return Exchange(packet, verify=no_bytes)


class Net(Profile):
    """Network: sending one frame."""

    name = "net"
    device_id = 1
    queues = (0, 1)
    main = 1
    has_requests = True

    def exchange(self, rig: Driver, serial: int) -> Exchange:
        """Return one Ethernet frame, after an empty virtio_net header."""
        frame = bytes.fromhex("020000000001020000000002 88b5") + struct.pack("<I", serial)
        return Exchange(bytes(12) + frame.ljust(60, b"\x5a"), verify=no_bytes)


PROFILES: dict[str, type[Profile]] = {
    profile.name: profile for profile in (Profile, Balloon, Rng, Blk, Fs, Vsock, Net)
}


def profile_named(name: str) -> str:
    """Return *name* if :func:`find_profile` finds it; a type for :mod:`argparse`.

    Raise :class:`argparse.ArgumentTypeError` if not.
    """
    try:
        find_profile(name)
    except Exception as error:  # a file of the user's may raise anything
        known = ", ".join(sorted(PROFILES))
        raise argparse.ArgumentTypeError(f"{error}; known are {known}") from None
    return name


def find_profile(name: str) -> type[Profile]:
    """Return the profile *name* of this module, or load ``FILE.py:CLASS`` or ``MODULE:CLASS``.

    Raise :class:`TypeError` if it is no profile, and whatever loading the file raises.
    """
    if name in PROFILES:
        return PROFILES[name]
    place, _, attribute = name.rpartition(":")
    if not place:
        raise TypeError(f"no device profile {name!r}")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).absolute())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = getattr(module, attribute)
    if not (isinstance(found, type) and issubclass(found, Profile)):
        raise TypeError(f"{name} is no profile")
    return found
