# SPDX-License-Identifier: Apache-2.0
"""Device profiles: what one valid request is, for each device type that the suite knows.

A profile is all that the ring tests need to know about a device.  To add one, subclass
:class:`Profile` and say which queues to start and what a request looks like;
``docs/conformance.md`` walks through it.
"""

from __future__ import annotations

import argparse
import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from virtio_conformance.memory import PAGE
from virtio_formats.virtio.balloon import BalloonPfn

if TYPE_CHECKING:
    from virtio_conformance.rig import Rig

__all__ = ("PROFILES", "Exchange", "Profile", "find_profile", "no_bytes", "profile_named")

FILL = 0xA5
"""What device-writable memory holds before the device writes to it."""


@dataclass
class Exchange:
    """One valid request: what the device reads, what it may write, and what then has to hold."""

    readable: bytes
    writable: int = 0
    """Bytes that the device may write."""
    verify: Callable[[int, bytes], str] = lambda used, data: ""
    """Used length and the device-writable bytes → what is wrong with them, or nothing."""
    effect: Callable[[], str] = lambda: ""
    """Looked at after use on the main ring: what is wrong in memory, or nothing."""
    may_change: tuple[tuple[int, int], ...] = ()
    """Guest memory that the request lets the device change besides, as address ranges."""


class Profile:
    """A device type without any known request: enough for the tests of the control plane."""

    name = "none"
    device_id = 0
    queues: tuple[int, ...] = ()
    """Rings to start, in this order."""
    main = 0
    """The ring that requests go to."""
    other: int | None = None
    """Another ring that takes the same requests, if there is one."""
    features = 0
    """Device-specific features to take when they are offered."""
    known_features = 0xFFFFFF | 0xFFFFFFFF << 50
    """Device-specific bits that the standard gives a meaning (0: none; default: any)."""
    config_size = 0
    writes = False
    """Whether requests on the main ring have a device-writable part."""
    has_requests = False

    def prepare(self, rig: Rig) -> None:
        """Called once the rings run: whatever has to come before the first request."""

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request; *serial* makes it differ from its neighbours."""
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

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
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
    """For requests without a device-writable part."""
    return "" if used == 0 else f"used length {used} for a buffer that nothing is written to"


class Rng(Profile):
    """Entropy source: a buffer to fill."""

    name = "rng"
    device_id = 4
    queues = (0,)
    known_features = 0
    writes = has_requests = True

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
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

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
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

    def prepare(self, rig: Rig) -> None:
        """Open the file system."""
        body = struct.pack("<IIII", 7, 31, 1 << 16, 0) + bytes(48)
        rig.run([self._fuse(self.INIT, 0, 1, body, 16 + 64)])

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
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

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
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

    def exchange(self, rig: Rig, serial: int) -> Exchange:
        """A valid request."""
        frame = bytes.fromhex("020000000001020000000002 88b5") + struct.pack("<I", serial)
        return Exchange(bytes(12) + frame.ljust(60, b"\x5a"), verify=no_bytes)


PROFILES: dict[str, type[Profile]] = {
    profile.name: profile for profile in (Profile, Balloon, Rng, Blk, Fs, Vsock, Net)
}


def profile_named(name: str) -> str:
    """*name* itself, if :func:`find_profile` finds it; for the command line's parser."""
    try:
        find_profile(name)
    except Exception as error:  # a file of the user's may raise anything
        known = ", ".join(sorted(PROFILES))
        raise argparse.ArgumentTypeError(f"{error}; known are {known}") from None
    return name


def find_profile(name: str) -> type[Profile]:
    """A profile of this module, or ``FILE.py:CLASS`` or ``MODULE:CLASS`` of anybody."""
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
