# SPDX-License-Identifier: Apache-2.0
"""A small vhost-user balloon back-end, written from the standards alone.

It shares nothing with vballoon or with the conformance suite: standard library only, one descriptor
at a time, split rings without optional ring features.  A suite that accuses it accuses a back-end
that keeps the standard.  ``--numbering`` chooses between two readings of the queue numbers:

* ``fixed``: inflateq 0, deflateq 1, statsq 2, free_page_vq 3, reporting_vq 4 (the standard's list);
* ``dense``: the queues of the negotiated features, numbered without gaps, as Linux does.

``python -m tests.conformance.others.plain_balloon --numbering fixed SOCKET`` serves one connection
after the other.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass, field

PAGE = 4096
VERSION_1, PROTOCOL_FEATURES = 1 << 32, 1 << 30
STATS_VQ, DEFLATE_ON_OOM, FREE_PAGE_HINT, PAGE_POISON, PAGE_REPORTING = (
    1 << bit for bit in range(1, 6)
)
FEATURES = (
    VERSION_1
    | PROTOCOL_FEATURES
    | STATS_VQ
    | DEFLATE_ON_OOM
    | FREE_PAGE_HINT
    | PAGE_POISON
    | PAGE_REPORTING
)
PF_MQ, PF_REPLY_ACK, PF_CONFIG, PF_RESET_DEVICE, PF_MEM_SLOTS = 0, 3, 9, 13, 15
PROTOCOL = sum(1 << b for b in (PF_MQ, PF_REPLY_ACK, PF_CONFIG, PF_RESET_DEVICE, PF_MEM_SLOTS))
QUEUES, SLOTS, CONFIG_SIZE, CONFIG_MAX, FDS_MAX, PAYLOAD_MAX = 5, 32, 16, 256, 8, 4096
ROLES = ("inflate", "deflate", "stats", "hint", "report")
HEADER = struct.Struct("<III")
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
INVALID_FD = 0x100

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
PUNCH_HOLE_KEEP_SIZE = 0x3


class Refused(Exception):
    """The front-end sent something that cannot be served."""


class RingBroken(Exception):
    """The driver put something into a ring that breaks the standard."""


@dataclass
class Region:
    """One entry of the memory table."""

    guest: int
    size: int
    user: int
    offset: int
    fd: int
    view: mmap.mmap

    def close(self) -> None:
        self.view.close()
        os.close(self.fd)


@dataclass
class Ring:
    """One virtqueue, device side."""

    size: int = 0
    descriptors: int = 0
    used: int = 0
    available: int = 0
    next_available: int = 0
    kick: int | None = None
    call: int | None = None
    error: int | None = None
    started: bool = False
    enabled: bool = False
    broken: bool = False
    held: list[int] = field(default_factory=list)
    """Buffers of the statistics queue that wait for the next request."""

    def close(self) -> None:
        for fd in (self.kick, self.call, self.error):
            if fd is not None:
                os.close(fd)
        self.__init__()  # type: ignore[misc]


class Balloon:
    """One connection: the session, its memory and its rings."""

    def __init__(self, connection: socket.socket, *, dense: bool) -> None:
        self.connection = connection
        self.dense = dense
        self.regions: list[Region] = []
        self.rings = [Ring() for _ in range(QUEUES)]
        self.features = 0
        self.protocol = 0
        self.config = bytearray(CONFIG_SIZE)  # num_pages, actual, free_page_hint_cmd_id, poison_val

    # ---- messages ----

    def serve(self) -> None:
        """Serve until the front-end disconnects or breaks the protocol."""
        try:
            while True:
                watched: list[int | socket.socket] = [self.connection]
                watched += [r.kick for r in self.rings if r.kick is not None and not r.broken]
                ready, _, _ = select.select(watched, [], [])
                for ring in self.rings:
                    if ring.kick in ready:
                        self._kicked(ring)
                if self.connection in ready:
                    self._message()
        except (Refused, EOFError, ConnectionError):
            pass
        finally:
            for ring in self.rings:
                ring.close()
            self._forget_memory()
            self.connection.close()

    def _receive(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < size:
            part, control, flags, _ = self.connection.recvmsg(
                size - len(data), socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
            )
            for level, kind, content in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            if not part or flags & socket.MSG_CTRUNC:
                for fd in fds:
                    os.close(fd)
                raise EOFError
            data += part
        return data, list(fds)

    def _message(self) -> None:
        head, fds = self._receive(HEADER.size)
        request, flags, size = HEADER.unpack(head)
        try:
            if flags & 3 != 1 or size > PAYLOAD_MAX:
                raise Refused("header")
            payload, more = self._receive(size) if size else (b"", [])
            fds += more
            handler = self.HANDLERS.get(request)
            if handler is None:
                raise Refused(f"request {request}")
            answer = handler(self, payload, fds)
            failed = 0
        except (Refused, struct.error, OSError, ValueError) as error:
            if not self._wants_reply(flags):
                raise Refused(str(error)) from None
            answer, failed = None, 1
        finally:
            for fd in fds:
                os.close(fd)
        if answer is None and self._wants_reply(flags):
            answer = struct.pack("<Q", failed)
        if answer is not None:
            self.connection.sendall(HEADER.pack(request, 1 | 4, len(answer)) + answer)

    def _wants_reply(self, flags: int) -> bool:
        return bool(flags & 8 and self.protocol & 1 << PF_REPLY_ACK)

    def _nothing(self, payload: bytes, fds: list[int]) -> None:
        """SET_OWNER; RESET_OWNER, which a back-end should ignore."""

    def _get_features(self, payload: bytes, fds: list[int]) -> bytes:
        return struct.pack("<Q", FEATURES)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        (wanted,) = struct.unpack("<Q", payload)
        if wanted & ~FEATURES:
            raise Refused("features that were not offered")
        self.features = wanted
        if not wanted & PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.enabled = True

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> bytes:
        return struct.pack("<Q", PROTOCOL)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        (wanted,) = struct.unpack("<Q", payload)
        if wanted & ~PROTOCOL:
            raise Refused("protocol features that were not offered")
        self.protocol = wanted

    def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        for ring in self.rings:
            ring.started = ring.broken = False
            ring.enabled = False
            ring.held.clear()
        self.config[:] = bytes(CONFIG_SIZE)

    def _get_queue_num(self, payload: bytes, fds: list[int]) -> bytes:
        return struct.pack("<Q", QUEUES)

    def _get_max_mem_slots(self, payload: bytes, fds: list[int]) -> bytes:
        return struct.pack("<Q", SLOTS)

    # ---- memory ----

    def _forget_memory(self) -> None:
        for region in self.regions:
            region.close()
        self.regions.clear()

    def _map(self, entry: bytes, fds: list[int]) -> Region:
        guest, size, user, offset = struct.unpack("<4Q", entry)
        if not fds:
            raise Refused("a memory region without a descriptor")
        fd = fds.pop(0)
        try:
            start = offset - offset % PAGE
            view = mmap.mmap(fd, offset - start + size, offset=start)
        except (OSError, ValueError, OverflowError):
            os.close(fd)
            raise
        return Region(guest, size, user, offset, fd, view)

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        count, _ = struct.unpack_from("<II", payload)
        if len(payload) != 8 + 32 * count or len(fds) != count:
            raise Refused("memory table")
        found: list[Region] = []
        try:
            for index in range(count):
                found.append(self._map(payload[8 + 32 * index :][:32], fds))
        except (OSError, ValueError, OverflowError, Refused):
            for region in found:
                region.close()
            raise
        self._forget_memory()
        self.regions = found

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        if len(payload) != 40 or len(fds) != 1 or len(self.regions) >= SLOTS:
            raise Refused("memory region")
        guest, size, _, _ = struct.unpack("<4Q", payload[8:])
        for old in self.regions:
            if guest < old.guest + old.size and old.guest < guest + size:
                raise Refused("memory regions overlap")
        self.regions.append(self._map(payload[8:], fds))

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        guest, size, user, _ = struct.unpack("<4Q", payload[8:])
        for region in self.regions:
            if (region.guest, region.size, region.user) == (guest, size, user):
                self.regions.remove(region)
                region.close()
                return
        raise Refused("no such memory region")

    def _find(self, address: int, length: int, *, user: bool = False) -> tuple[Region, int]:
        """Return the region that holds the bytes, and their offset in it."""
        for region in self.regions:
            offset = address - (region.user if user else region.guest)
            if offset >= 0 and offset + length <= region.size:
                return region, offset
        raise RingBroken(f"{address:#x}+{length:#x} is outside guest memory")

    def _read(self, address: int, length: int, *, user: bool = False) -> bytes:
        region, offset = self._find(address, length, user=user)
        start = region.offset % PAGE + offset
        return region.view[start : start + length]

    def _write(self, address: int, data: bytes) -> None:
        region, offset = self._find(address, len(data), user=True)
        start = region.offset % PAGE + offset
        region.view[start : start + len(data)] = data

    def _discard(self, address: int, length: int) -> None:
        """Free whole pages of guest memory within one region after the other."""
        while length:
            region, offset = self._find(address, PAGE)
            part = min(length, region.size - offset)
            code = _fallocate(region.fd, PUNCH_HOLE_KEEP_SIZE, region.offset + offset, part)
            if code:
                return  # advisory: a page that cannot be freed keeps its content
            address, length = address + part, length - part

    # ---- rings ----

    def _ring(self, index: int) -> Ring:
        if index >= QUEUES:
            raise Refused(f"queue {index}")
        return self.rings[index]

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        index, size = struct.unpack("<II", payload)
        if not 0 < size <= 32768 or size & (size - 1):
            raise Refused("queue size")
        self._ring(index).size = size

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        index, _, descriptors, used, available, _ = struct.unpack("<IIQQQQ", payload)
        ring = self._ring(index)
        try:
            self._find(descriptors, 16 * ring.size, user=True)
            self._find(available, 6 + 2 * ring.size, user=True)
            self._find(used, 6 + 8 * ring.size, user=True)
        except RingBroken as error:
            raise Refused(str(error)) from None
        ring.descriptors, ring.used, ring.available = descriptors, used, available

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        index, base = struct.unpack("<II", payload)
        self._ring(index).next_available = base & 0xFFFF

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> bytes:
        index, _ = struct.unpack("<II", payload)
        ring = self._ring(index)
        ring.started = False
        # A held buffer was taken and not used: the driver's next device finds it again.
        ring.next_available = (ring.next_available - len(ring.held)) & 0xFFFF
        ring.held.clear()
        ring.broken = False
        self._replace(ring, "kick", None)
        return struct.pack("<II", index, ring.next_available)

    def _replace(self, ring: Ring, name: str, fd: int | None) -> None:
        old = getattr(ring, name)
        if old is not None:
            os.close(old)
        setattr(ring, name, fd)

    def _set_fd(self, name: str, payload: bytes, fds: list[int]) -> Ring:
        (value,) = struct.unpack("<Q", payload)
        ring = self._ring(value & 0xFF)
        if len(fds) != (not value & INVALID_FD):
            raise Refused("descriptor of a queue")
        self._replace(ring, name, fds.pop() if fds else None)
        return ring

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        ring = self._set_fd("kick", payload, fds)
        ring.started = True
        self._process(ring)

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        self._set_fd("call", payload, fds)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        self._set_fd("error", payload, fds)

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        index, value = struct.unpack("<II", payload)
        if value > 1:
            raise Refused("neither enabled nor disabled")
        ring = self._ring(index)
        ring.enabled = bool(value)
        self._process(ring)

    def _kicked(self, ring: Ring) -> None:
        if ring.kick is None:
            return
        try:
            os.read(ring.kick, 8)
        except OSError:
            self._replace(ring, "kick", None)
        self._process(ring)

    def _process(self, ring: Ring) -> None:
        if not ring.started or not ring.enabled or ring.broken or not ring.descriptors:
            return
        try:
            self._serve_ring(ring)
        except RingBroken:
            ring.broken = True
            if ring.error is not None:
                os.write(ring.error, (1).to_bytes(8, "little"))

    def _serve_ring(self, ring: Ring) -> None:
        role = self._role(self.rings.index(ring))
        done = False
        while True:
            (available,) = struct.unpack("<H", self._read(ring.available + 2, 2, user=True))
            waiting = (available - ring.next_available) & 0xFFFF
            if waiting > ring.size:
                raise RingBroken("available index")
            if not waiting:
                break
            slot = ring.available + 4 + 2 * (ring.next_available % ring.size)
            (head,) = struct.unpack("<H", self._read(slot, 2, user=True))
            chain = self._chain(ring, head)
            ring.next_available = (ring.next_available + 1) & 0xFFFF
            if role == "stats":
                self._check_readable(chain)
                for old in ring.held:
                    self._use(ring, old)
                    done = True
                ring.held[:] = [head]
            else:
                self._handle(role, chain)
                self._use(ring, head)
                done = True
        if done and ring.call is not None:
            (flags,) = struct.unpack("<H", self._read(ring.available, 2, user=True))
            if not flags & 1:
                os.write(ring.call, (1).to_bytes(8, "little"))

    def _role(self, index: int) -> str:
        if not self.dense:
            return ROLES[index]
        needs = (0, 0, STATS_VQ, FREE_PAGE_HINT, PAGE_REPORTING)
        there = [r for r, bit in zip(ROLES, needs, strict=True) if not bit or self.features & bit]
        return there[index] if index < len(there) else "nothing"

    def _chain(self, ring: Ring, head: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        index = head
        while True:
            if index >= ring.size or len(found) >= ring.size:
                raise RingBroken("descriptor chain")
            raw = self._read(ring.descriptors + 16 * index, 16, user=True)
            address, length, flags, following = struct.unpack("<QIHH", raw)
            if flags & F_INDIRECT:
                raise RingBroken("an indirect table was not negotiated")
            if found and found[-1][2] and not flags & F_WRITE:
                raise RingBroken("a readable element after a writable one")
            if length:
                self._find_all(address, length)
            found.append((address, length, bool(flags & F_WRITE)))
            if not flags & F_NEXT:
                return found
            index = following

    def _find_all(self, address: int, length: int) -> None:
        """Raise RingBroken unless all bytes are in guest memory, in one region or adjacent ones."""
        while length:
            region, offset = self._find(address, 1)
            part = min(length, region.size - offset)
            address, length = address + part, length - part

    def _use(self, ring: Ring, head: int) -> None:
        (index,) = struct.unpack("<H", self._read(ring.used + 2, 2, user=True))
        self._write(ring.used + 4 + 8 * (index % ring.size), struct.pack("<II", head, 0))
        self._write(ring.used + 2, struct.pack("<H", (index + 1) & 0xFFFF))

    # ---- the balloon ----

    def _check_readable(self, chain: list[tuple[int, int, bool]]) -> None:
        if any(writable for _, _, writable in chain):
            raise RingBroken("a writable element where readable ones are due")

    def _handle(self, role: str, chain: list[tuple[int, int, bool]]) -> None:
        if role == "report":
            self._report(chain)
        elif role == "inflate":
            self._inflate(chain)
        # Deflated pages need no action; hints are only hints.

    def _inflate(self, chain: list[tuple[int, int, bool]]) -> None:
        self._check_readable(chain)
        numbers = b""
        for address, length, _ in chain:
            while length:
                region, offset = self._find(address, 1)
                part = min(length, region.size - offset)
                numbers += self._read(address, part)
                address, length = address + part, length - part
        for (pfn,) in struct.iter_unpack("<I", numbers[: len(numbers) & ~3]):
            try:
                self._find(pfn * PAGE, PAGE)
            except RingBroken:
                continue
            self._discard(pfn * PAGE, PAGE)

    def _report(self, chain: list[tuple[int, int, bool]]) -> None:
        poison = int.from_bytes(self.config[12:16], "little")
        if self.features & PAGE_POISON and poison:
            return
        for address, length, writable in chain:
            if writable and address % PAGE == 0 and length % PAGE == 0:
                self._discard(address, length)

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        offset, size, flags = struct.unpack_from("<III", payload)
        if size > CONFIG_MAX or len(payload) != 12 + size or offset + size > CONFIG_MAX:
            raise Refused("configuration space")
        content = bytes(self.config).ljust(CONFIG_MAX, b"\0")[offset : offset + size]
        return struct.pack("<III", offset, size, flags) + content

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        offset, size, _ = struct.unpack_from("<III", payload)
        if len(payload) != 12 + size or offset + size > CONFIG_SIZE:
            raise Refused("configuration space")
        merged = bytearray(self.config)
        merged[offset : offset + size] = payload[12:]
        self.config[4:8], self.config[12:16] = merged[4:8], merged[12:16]  # actual, poison_val

    HANDLERS = {  # noqa: RUF012
        1: _get_features, 2: _set_features, 3: _nothing, 4: _nothing, 5: _set_mem_table,
        8: _set_vring_num,
        9: _set_vring_addr, 10: _set_vring_base, 11: _get_vring_base, 12: _set_vring_kick,
        13: _set_vring_call, 14: _set_vring_err, 15: _get_protocol_features,
        16: _set_protocol_features, 17: _get_queue_num, 18: _set_vring_enable, 24: _get_config,
        25: _set_config, 34: _reset_device, 36: _get_max_mem_slots, 37: _add_mem_reg,
        38: _rem_mem_reg,
    }  # fmt: skip


def main() -> None:
    """Listen on the socket and serve one front-end after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbering", choices=("fixed", "dense"), required=True)
    parser.add_argument("socket")
    options = parser.parse_args()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.socket)
        listener.listen(4)
        while True:
            connection, _ = listener.accept()
            Balloon(connection, dense=options.numbering == "dense").serve()


if __name__ == "__main__":
    main()
