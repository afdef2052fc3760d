# SPDX-License-Identifier: Apache-2.0
"""State as a value: what a device and a connection are, so that they can be continued elsewhere.

:class:`BaseState` is the PCI function as the guest sees it; a device's ``save_state`` can wrap
it.  :class:`SessionState` is one connection with everything that its client has set up, the base
included; a server that takes over the connection's descriptors continues it.  Both are checked
like untrusted input, as a whole, before anything of them is taken over.

Descriptors are not part of a value: it names them by slot (:mod:`vfio_user.descriptors`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import Any

from vfio_user.errors import RequestError
from virtio_formats.vfio_user import Capabilities
from virtio_formats.vfio_user.state import (
    BASE_MAGIC,
    NONE_32,
    SESSION_MAGIC,
    BaseBody,
    IrqStateFlag,
    SessionBody,
    SessionFlag,
    seal,
    unseal,
)
from virtio_formats.wire import WireError

__all__ = (
    "BaseState",
    "DmaWindow",
    "IrqState",
    "IrqVector",
    "MigrationState",
    "SessionState",
    "require",
)

_MAX_SLOT = 1 << 20
"""Slots are small numbers; more would be a mistake, and cost memory."""


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`~vfio_user.errors.RequestError` EINVAL with *otherwise* unless *holds*."""
    if not holds:
        raise RequestError(errno.EINVAL, f"state: {otherwise}")


@dataclass(frozen=True, kw_only=True)
class IrqState:
    """One vector as the function has it: an edge that waits, and its own mask bit."""

    index: int
    vector: int
    pending: bool = False
    barred: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseState:
    """The PCI function as the guest sees it.

    *config* is configuration space, *intx* the level of the pin, *held* the interrupt indices
    that are masked as a whole, *irqs* the vectors that differ from their state after power-on.
    """

    config: bytes
    intx: bool = False
    held: tuple[int, ...] = ()
    irqs: tuple[IrqState, ...] = ()

    def pack(self) -> bytes:
        """Return the packed form (``virtio_formats.vfio_user.state``)."""
        flag = IrqStateFlag
        body = BaseBody(
            intx=self.intx,
            held=sum(1 << index for index in self.held),
            config=self.config,
            vectors=[
                {
                    "index": irq.index,
                    "vector": irq.vector,
                    "flags": flag.PENDING * irq.pending | flag.BARRED * irq.barred,
                }
                for irq in self.irqs
            ],
        )
        return seal(BASE_MAGIC, body.build())

    @classmethod
    def unpack(cls, packed: bytes) -> BaseState:
        """Read the packed form.  Raise :class:`~vfio_user.errors.RequestError` EINVAL."""
        try:
            body = BaseBody.parse(unseal(BASE_MAGIC, packed))
        except WireError as error:
            raise RequestError(errno.EINVAL, f"state: {error}") from None
        require(body.intx in (0, 1), f"an INTx level of {body.intx}")
        flags = IrqStateFlag.PENDING | IrqStateFlag.BARRED
        require(not any(v["flags"] & ~flags for v in body.vectors), "unknown vector flags")
        return cls(
            config=body.config,
            intx=bool(body.intx),
            held=tuple(bit for bit in range(8) if body.held >> bit & 1),
            irqs=tuple(
                IrqState(
                    index=v["index"],
                    vector=v["vector"],
                    pending=bool(v["flags"] & IrqStateFlag.PENDING),
                    barred=bool(v["flags"] & IrqStateFlag.BARRED),
                )
                for v in body.vectors
            ),
        )


@dataclass(frozen=True, kw_only=True)
class DmaWindow:
    """One DMA region: bytes, DMA_MAP flags, and the slot of its descriptor (None: by messages)."""

    address: int
    size: int
    flags: int
    offset: int = 0
    slot: int | None = None


@dataclass(frozen=True, kw_only=True)
class IrqVector:
    """What the client has set up for one vector: slots of eventfds, and its mask."""

    index: int
    vector: int
    trigger: int | None = None
    on_mask: int | None = None
    on_unmask: int | None = None
    masked: bool = False


@dataclass(frozen=True, kw_only=True)
class MigrationState:
    """The migration state (``DeviceState``), and the data that is under way in either direction."""

    state: int
    outgoing: bytes = b""
    incoming: bytes = b""


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """One connection, and everything that its client has set up.

    *client* is None before the negotiation.  *layout* is the offset of the data in DMA messages,
    0 while it is unknown; *next_id* and *owed* (identifiers that may still be answered) number
    them.  *ranges* are the (iova, length) of DMA logging, None while it is off.  What was logged
    is not part of the state: everything that can be written is reported as written once more.
    """

    base: BaseState
    migration: MigrationState
    client: Capabilities | None = None
    minor: int = 0
    twin: bool = False
    layout: int = 0
    next_id: int = 0
    owed: tuple[int, ...] = ()
    dma: tuple[DmaWindow, ...] = ()
    irqs: tuple[IrqVector, ...] = ()
    ranges: tuple[tuple[int, int], ...] | None = None

    @property
    def slots(self) -> list[int]:
        """Return every slot that is named, in order of the windows and vectors."""
        named = [window.slot for window in self.dma]
        for irq in self.irqs:
            named += [irq.trigger, irq.on_mask, irq.on_unmask]
        return [slot for slot in named if slot is not None]

    def pack(self) -> bytes:
        """Return the packed form (``virtio_formats.vfio_user.state``)."""
        client = self.client or Capabilities()
        body = SessionBody(
            flags=int(_flags(self, client)),
            minor=self.minor,
            layout=self.layout,
            next_id=self.next_id,
            max_msg_fds=client.max_msg_fds,
            max_data_xfer_size=client.max_data_xfer_size,
            max_dma_maps=client.max_dma_maps,
            pgsizes=client.pgsizes,
            twin_fd_index=_none(client.twin_socket_fd_index),
            migration_pgsize=client.migration_pgsize or 0,
            migration_max_bitmap_size=client.migration_max_bitmap_size or 0,
            owed=list(self.owed),
            dma=[_window(window) for window in self.dma],
            irqs=[_vector(irq) for irq in self.irqs],
            ranges=[{"iova": iova, "length": length} for iova, length in self.ranges or ()],
            migration=self.migration.state,
            outgoing=self.migration.outgoing,
            incoming=self.migration.incoming,
            base=self.base.pack(),
        )
        return seal(SESSION_MAGIC, body.build())

    @classmethod
    def unpack(cls, packed: bytes) -> SessionState:
        """Read the packed form.  Raise :class:`~vfio_user.errors.RequestError` EINVAL."""
        try:
            body = SessionBody.parse(unseal(SESSION_MAGIC, packed))
            client = _capabilities(body)
        except WireError as error:
            raise RequestError(errno.EINVAL, f"state: {error}") from None
        require(not body.flags & ~_ALL_FLAGS, f"unknown flags {body.flags:#x}")
        logging = bool(body.flags & SessionFlag.LOGGING)
        require(logging or not body.ranges, "ranges of a log that is off")
        require(
            not any(v["flags"] & ~IrqStateFlag.MASKED for v in body.irqs), "unknown vector flags"
        )
        return cls(
            base=BaseState.unpack(body.base),
            migration=MigrationState(
                state=body.migration, outgoing=body.outgoing, incoming=body.incoming
            ),
            client=client,
            minor=body.minor,
            twin=bool(body.flags & SessionFlag.TWIN),
            layout=body.layout,
            next_id=body.next_id,
            owed=tuple(body.owed),
            dma=tuple(DmaWindow(**{**w, "slot": _slot(w["slot"])}) for w in body.dma),
            irqs=tuple(_irq(v) for v in body.irqs),
            ranges=tuple((r["iova"], r["length"]) for r in body.ranges) if logging else None,
        )


_ALL_FLAGS = int(sum(SessionFlag))


def _flags(state: SessionState, client: Capabilities) -> SessionFlag:
    flag = SessionFlag
    pairs = (
        (flag.NEGOTIATED, state.client is not None),
        (flag.TWIN, state.twin),
        (flag.LOGGING, state.ranges is not None),
        (flag.CLIENT_TWIN, client.twin_socket),
        (flag.CLIENT_WRITE_MULTIPLE, client.write_multiple),
        (flag.CLIENT_MIGRATION_PGSIZE, client.migration_pgsize is not None),
        (flag.CLIENT_MIGRATION_MAX_BITMAP_SIZE, client.migration_max_bitmap_size is not None),
    )
    found = flag(0)
    for bit, on in pairs:
        found |= bit if on else flag(0)
    return found


def _capabilities(body: SessionBody) -> Capabilities | None:
    """Return the client's capabilities, checked like those of a VERSION message."""
    flag = SessionFlag
    client = Capabilities(
        max_msg_fds=body.max_msg_fds,
        max_data_xfer_size=body.max_data_xfer_size,
        max_dma_maps=body.max_dma_maps,
        pgsizes=body.pgsizes,
        twin_socket=bool(body.flags & flag.CLIENT_TWIN),
        twin_socket_fd_index=_slot(body.twin_fd_index),
        write_multiple=bool(body.flags & flag.CLIENT_WRITE_MULTIPLE),
        migration_pgsize=_where(body.flags & flag.CLIENT_MIGRATION_PGSIZE, body.migration_pgsize),
        migration_max_bitmap_size=_where(
            body.flags & flag.CLIENT_MIGRATION_MAX_BITMAP_SIZE, body.migration_max_bitmap_size
        ),
    )
    # Build every member, whether the flags would leave it out or not, and parse it again.
    complete = replace(client, twin_socket=True, migration_pgsize=client.migration_pgsize or 4096)
    Capabilities.parse(complete.build())
    if not body.flags & flag.NEGOTIATED:
        if client != Capabilities():
            raise WireError("capabilities of a client that has not negotiated")
        return None
    return client


def _where(flag: int, value: int) -> int | None:
    if not flag and value:
        raise WireError("a value without its flag")
    return value if flag else None


def _none(number: int | None) -> int:
    return NONE_32 if number is None else number


def _slot(number: int) -> int | None:
    if number != NONE_32 and number > _MAX_SLOT:
        raise RequestError(errno.EINVAL, f"state: slot {number}")
    return None if number == NONE_32 else number


def _window(window: DmaWindow) -> dict[str, Any]:
    return {
        "address": window.address,
        "size": window.size,
        "offset": window.offset,
        "flags": window.flags,
        "slot": _none(window.slot),
    }


def _vector(irq: IrqVector) -> dict[str, Any]:
    return {
        "index": irq.index,
        "vector": irq.vector,
        "flags": IrqStateFlag.MASKED * irq.masked,
        "trigger": _none(irq.trigger),
        "on_mask": _none(irq.on_mask),
        "on_unmask": _none(irq.on_unmask),
    }


def _irq(found: dict[str, Any]) -> IrqVector:
    return IrqVector(
        index=found["index"],
        vector=found["vector"],
        trigger=_slot(found["trigger"]),
        on_mask=_slot(found["on_mask"]),
        on_unmask=_slot(found["on_unmask"]),
        masked=bool(found["flags"] & IrqStateFlag.MASKED),
    )
