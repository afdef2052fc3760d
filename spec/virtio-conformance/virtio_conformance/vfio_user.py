# SPDX-License-Identifier: Apache-2.0
"""A vfio-user client: every command, in any order, well-formed or not."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from virtio_conformance.findings import Finding, Hang
from virtio_conformance.memory import GuestRam, Region
from virtio_conformance.wiretap import Tap
from virtio_formats.vfio_user import (
    Command,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    Header,
    HeaderFlags,
    IrqInfo,
    IrqSet,
    IrqSetFlags,
    RegionAccess,
    RegionInfo,
    Version,
)

__all__ = ("Answer", "Client", "command_name")

DEFAULT_CAPABILITIES: dict[str, Any] = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}


def command_name(command: int) -> str:
    """Return the standard's name of a command, or its number."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


@dataclass
class Answer:
    """A reply: the header's fields, the payload, and descriptors, which the caller closes."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the error flag is set."""
        return bool(self.flags & HeaderFlags.ERROR)


class Client:
    """One connection to a vfio-user server; serves its DMA messages while it waits."""

    def __init__(self, sock: socket.socket, limit: float = 2.0, first: float = 0.0) -> None:
        self.tap = Tap(sock, limit, first)
        self.next_id = 0
        self.ram: GuestRam | None = None
        """Memory in which DMA messages of the server are served."""
        self.dma_messages: list[tuple[int, int, int]] = []
        """DMA messages of the server: command, address, count."""
        self.short_dma = 0
        """Maximum bytes to serve of a DMA message (0: all)."""
        self.refuse_dma = False
        self.capabilities: dict[str, Any] = {}

    def close(self) -> None:
        """Disconnect."""
        self.tap.close()

    # -- messages ----------------------------------------------------------------------------

    def send(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
        message_id: int | None = None,
    ) -> int:
        """Send a command; *flags*, *size* and *message_id* override the header.  Return the id."""
        if message_id is None:
            self.next_id = message_id = (self.next_id + 1) & 0xFFFF
        length = Header.SIZE + len(payload) if size is None else size
        header = Header(id=message_id, command=command, size=length, flags=flags, error=0)
        self.tap.note(
            f"-> {command_name(command)} id={message_id} flags={flags:#x} size={length}"
            f" payload={payload[:40].hex()} fds={len(fds)}"
        )
        self.tap.send(header.build() + payload, fds)
        return message_id

    def receive(self, limit: float | None = None) -> Answer:
        """Return the next reply; serve commands of the server that come before it."""
        while True:
            answer = self._message(limit)
            if answer.flags & HeaderFlags.TYPE_MASK != HeaderFlags.TYPE_COMMAND:
                return answer
            self._serve(answer)

    def _message(self, limit: float | None) -> Answer:
        raw, fds = self.tap.receive(Header.SIZE, limit)
        header = Header.parse(raw)
        if not Header.SIZE <= header.size <= 1 << 24:
            raise Finding(f"a message announces {header.size} bytes")
        body = header.size - Header.SIZE
        payload, more = self.tap.receive(body, limit) if body else (b"", [])
        self.tap.note(
            f"<- {command_name(header.command)} id={header.id} flags={header.flags:#x}"
            f" error={header.error} size={header.size} payload={payload[:40].hex()}"
            f" fds={len(fds + more)}"
        )
        return Answer(header.id, header.command, header.flags, header.error, payload, fds + more)

    def _serve(self, request: Answer) -> None:
        if request.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise Finding(f"the server sends {command_name(request.command)}")
        access = DmaAccess.parse(request.payload[: DmaAccess.SIZE])
        self.dma_messages.append((request.command, access.address, access.count))
        flags, error, body = self._dma(request.command, access, request.payload[DmaAccess.SIZE :])
        header = Header(
            id=request.id,
            command=request.command,
            size=Header.SIZE + len(body),
            flags=flags,
            error=error,
        )
        self.tap.send(header.build() + body)

    def _dma(self, command: int, access: DmaAccess, data: bytes) -> tuple[int, int, bytes]:
        refused = HeaderFlags.TYPE_REPLY | HeaderFlags.ERROR, 22, b""
        if self.ram is None or self.refuse_dma:
            return refused
        count = min(access.count, self.short_dma) if self.short_dma else access.count
        done = DmaAccess(address=access.address, count=count).build()
        try:
            if command == Command.DMA_WRITE:
                self.ram.write(access.address, data[:count])
                return HeaderFlags.TYPE_REPLY, 0, done
            return HeaderFlags.TYPE_REPLY, 0, done + self.ram.read(access.address, count)
        except KeyError:
            return refused

    def serve_for(self, seconds: float) -> None:
        """Serve the server's DMA messages for *seconds*.  Raise a finding for a reply."""
        if not select.select([self.tap.sock], [], [], seconds)[0]:
            return
        try:
            answer = self.receive(seconds + 0.01)
        except Hang:
            return
        raise Finding(f"a reply to {command_name(answer.command)} that was not requested")

    def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a command and return its reply, whose header has to match."""
        return self.expect(command, self.send(command, payload, fds))

    def expect(self, command: int, message_id: int) -> Answer:
        """Return the reply to a command that was sent before."""
        answer = self.receive()
        if (answer.id, answer.command) != (message_id, command):
            raise Finding(
                f"a reply to {command_name(answer.command)} id {answer.id} where one to"
                f" {command_name(command)} id {message_id} is due"
            )
        if answer.failed and answer.payload:
            raise Finding(f"an error reply with {len(answer.payload)} bytes of payload")
        return answer

    def do(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a command that has to succeed, and return its reply."""
        answer = self.ask(command, payload, fds)
        if answer.failed:
            raise Finding(f"{command_name(command)} failed with errno {answer.error}")
        return answer

    # -- session -----------------------------------------------------------------------------

    def negotiate(self, capabilities: dict[str, Any] | None = None, minor: int = 0) -> Answer:
        """Send VERSION and return the reply; keep the server's :attr:`capabilities`."""
        offered = DEFAULT_CAPABILITIES if capabilities is None else capabilities
        data = json.dumps({"capabilities": offered}).encode() + b"\0"
        answer = self.do(Command.VERSION, Version(major=0, minor=minor).build() + data)
        text = answer.payload[Version.SIZE :].rstrip(b"\0")
        self.capabilities = json.loads(text).get("capabilities", {}) if text else {}
        return answer

    def info(self) -> DeviceInfo:
        """Return the reply to DEVICE_GET_INFO."""
        request = DeviceInfo(argsz=16, flags=0, num_regions=0, num_irqs=0)
        return DeviceInfo.parse(self.do(Command.DEVICE_GET_INFO, request.build()).payload)

    def region_info(self, index: int, argsz: int = 32) -> tuple[RegionInfo, bytes, list[int]]:
        """Return the fixed part of a DEVICE_GET_REGION_INFO reply, the rest, and descriptors."""
        request = RegionInfo(argsz=argsz, flags=0, index=index, cap_offset=0, size=0, offset=0)
        answer = self.do(Command.DEVICE_GET_REGION_INFO, request.build())
        if len(answer.payload) < RegionInfo.SIZE:
            raise Finding(f"region info of {len(answer.payload)} bytes")
        fixed = RegionInfo.parse(answer.payload[: RegionInfo.SIZE])
        return fixed, answer.payload[RegionInfo.SIZE :], answer.fds

    def irq_info(self, index: int) -> IrqInfo:
        """Return the reply to DEVICE_GET_IRQ_INFO."""
        request = IrqInfo(argsz=16, flags=0, index=index, count=0)
        return IrqInfo.parse(self.do(Command.DEVICE_GET_IRQ_INFO, request.build()).payload)

    def set_irqs(
        self, index: int, start: int, fds: Sequence[int], *, count: int | None = None
    ) -> Answer:
        """Assign eventfds as triggers (none: remove them), and return the reply."""
        number = len(fds) if count is None else count
        kind = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        message = IrqSet(argsz=20, flags=kind, index=index, start=start, count=number)
        return self.ask(Command.DEVICE_SET_IRQS, message.build(), fds)

    # -- regions and memory ------------------------------------------------------------------

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Return the bytes of a REGION_READ that has to succeed."""
        request = RegionAccess(offset=offset, region=region, count=count)
        payload = self.do(Command.REGION_READ, request.build()).payload
        if payload[: RegionAccess.SIZE] != request.build():
            raise Finding(f"REGION_READ of {request} echoes {payload[:16].hex()}")
        if len(payload) != RegionAccess.SIZE + count:
            raise Finding(f"REGION_READ of {count} bytes returns {len(payload) - 16}")
        return payload[RegionAccess.SIZE :]

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Send a REGION_WRITE that has to succeed."""
        request = RegionAccess(offset=offset, region=region, count=len(data)).build()
        payload = self.do(Command.REGION_WRITE, request + data).payload
        if payload != request:
            raise Finding(f"REGION_WRITE echoes {payload.hex()}, expected {request.hex()}")

    def map(self, region: Region, *, with_fd: bool = True) -> Answer:
        """Send DMA_MAP for a memory region and return the reply."""
        message = DmaMap(
            argsz=32,
            flags=DmaMapFlags.READABLE | DmaMapFlags.WRITEABLE,
            offset=region.offset if with_fd else 0,
            address=region.guest,
            size=region.size,
        )
        return self.ask(Command.DMA_MAP, message.build(), [region.fd] if with_fd else [])

    def unmap(self, region: Region) -> Answer:
        """Send DMA_UNMAP for a memory region and return the reply."""
        message = DmaUnmap(argsz=24, flags=0, address=region.guest, size=region.size)
        return self.ask(Command.DMA_UNMAP, message.build())

    def usable(self) -> bool:
        """Return True if the connection answers, False if it was closed.  Else raise Hang."""
        if self.tap.closed:
            return False
        try:
            wanted = self.send(
                Command.DEVICE_GET_INFO,
                DeviceInfo(argsz=16, flags=0, num_regions=0, num_irqs=0).build(),
                message_id=0xBEEF,
            )
            while self.receive().id != wanted:
                pass  # replies to what a test sent before
        except Hang:
            raise Hang("the control socket does not answer any more") from None
        except Finding:
            return not self.tap.closed
        return True


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came with a reply."""
    for fd in fds:
        os.close(fd)
