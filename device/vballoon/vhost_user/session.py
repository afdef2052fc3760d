# SPDX-License-Identifier: Apache-2.0
"""The vhost-user session: bytes and descriptors in, replies out.  No socket, no clock.

What arrives is cut into messages; each is checked against the table of message rules
(:data:`virtio_formats.vhost_user.MESSAGES`), handed to the handler of its request, and answered as
"Communication" and "VHOST_USER_PROTOCOL_F_REPLY_ACK" of vhost-user.rst (QEMU 11.1.3) say.

Three things can happen to a message, and nothing else:

* it is carried out, and answered where an answer is due;
* it is **refused**: nothing has changed; the answer says so where it can.  Where it cannot (no
  answer is due, or its form has no room for an error) the connection is closed, because the
  front-end would continue to assume that it was carried out;
* the stream itself is not vhost-user (wrong version, a reply where a request is due, an absurd
  size, too many descriptors): the connection is closed without an answer.

Descriptors belong to the session from :meth:`Session.feed` on.  They travel with the message that
was under way, or began, with the first byte of their chunk; handlers take what they keep, and the
rest is closed when the message is done with, whatever became of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from fdsocket import close_fds
from vballoon.errors import PeerError, ProtocolError
from vballoon.virtio import internal_fault
from virtio_formats.vhost_user import (
    MAX_FDS_PER_MESSAGE,
    MAX_PAYLOAD,
    MESSAGES,
    VERSION,
    HeaderFlag,
    MessageRule,
    ProtocolFeature,
    Request,
    VhostUserHeader,
    VhostUserInflight,
    VhostUserU64,
    request_name,
)
from virtio_formats.wire import WireError, WireStruct

__all__ = ("LATER", "Fds", "Handler", "Reply", "Session", "u64")

log = logging.getLogger(__name__)

_HEADER = VhostUserHeader.SIZE
_KNOWN_FLAGS = int(HeaderFlag.VERSION_MASK | HeaderFlag.REPLY | HeaderFlag.NEED_REPLY)
FAILURE = 1
"""The non-zero value that says "failed" in an acknowledgement."""
STATE_FD_FAILURE = 0x101
"""Failure of SET_DEVICE_STATE_FD: an error in bits 0-7, and bit 8, no descriptor returned."""


class Fds:
    """The descriptors that came with a message, in order; what is not taken is closed."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> int:
        """Return the next descriptor, which the caller then owns."""
        return self._fds.pop(0)

    def add(self, fds: Iterable[int]) -> None:
        """More descriptors of the same message."""
        self._fds.extend(fds)

    def close(self) -> None:
        """Close what nobody took."""
        close_fds(self._fds)
        self._fds.clear()


@dataclass(frozen=True, slots=True)
class Reply:
    """A handler's answer: payload, and descriptors which the session takes over."""

    payload: bytes
    fds: list[int] = field(default_factory=list)


class _Later(Enum):
    LATER = "the answer comes by finish()"


LATER: Final = _Later.LATER
"""What a handler returns whose answer is not known yet (see :meth:`Session.finish`)."""

Handler = Callable[[Any, Fds], Reply | _Later | None]
"""Takes the parsed payload and the descriptors; None means "done" (acknowledged if asked for)."""


def u64(value: int) -> Reply:
    """Return the reply with a single 64-bit integer."""
    return Reply(VhostUserU64(u64=value).build())


class Session:
    """One front-end's connection.

    *handlers* serve the requests other than GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES, which
    are the session's own; *offered* are the protocol features that are offered.
    ``protocol_features`` are those acknowledged so far; ``error`` is why the session ended, if it
    ended badly; ``counters`` counts messages by name, and refusals under ``refused``.
    """

    def __init__(self, handlers: Mapping[Request, Handler], offered: ProtocolFeature) -> None:
        self._handlers: dict[Request, Handler] = {
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            **handlers,
        }
        self.offered = offered
        self.protocol_features = ProtocolFeature(0)
        self.error: ProtocolError | None = None
        self.counters: Counter[str] = Counter()
        self._buffer = bytearray()
        self._header: VhostUserHeader | None = None
        self._fds = Fds()
        self._output: list[tuple[bytes, list[int]]] = []
        self._waiting: VhostUserHeader | None = None
        self._open = True

    # -- input --------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """False once the connection is to be closed (after the output has been written)."""
        return self._open

    def wanted(self) -> int:
        """How many bytes complete the current header or message.

        Feeding no more than this at a time keeps descriptors with the message they came with.
        """
        whole = _HEADER + (self._header.size if self._header else 0)
        return max(1, whole - len(self._buffer))

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Take in bytes and descriptors, and act on every message that is complete.

        Never raises for what the peer sent.  The caller writes :meth:`take_output` afterwards,
        and closes the connection once :attr:`is_open` is False.
        """
        self._fds.add(fds)
        if not self._open:
            self._fds.close()
            return
        self._buffer += data
        if len(self._fds) > MAX_FDS_PER_MESSAGE:
            self._fail(ProtocolError("fds-surplus", f"{len(self._fds)} with one message"))
        self._run()
        if self._waiting is not None and len(self._buffer) > _HEADER + MAX_PAYLOAD:
            self._fail(ProtocolError("message-early", "more requests while an answer is due"))

    def receive_eof(self) -> None:
        """Handle the end of the peer's stream; it is an error in the middle of a message."""
        if self._open and (self._buffer or len(self._fds)):
            self._fail(ProtocolError("message-truncated", f"after {len(self._buffer)} bytes"))
        self.close()

    def close(self) -> None:
        """End the session and close every descriptor that it still owns."""
        self._open = False
        self._fds.close()
        self._waiting = None
        for _, fds in self._output:
            close_fds(fds)
        self._output.clear()

    def request_counters(self) -> tuple[tuple[int, int], ...]:
        """Return how many messages of each known request came; request 0 counts refused ones."""
        numbers = {"refused": 0} | {request.name: int(request) for request in Request}
        return tuple(
            sorted((numbers[n], count) for n, count in self.counters.items() if n in numbers)
        )

    def restore(self, features: ProtocolFeature, counters: Iterable[tuple[int, int]]) -> None:
        """Continue the session of another process, between two messages."""
        self.protocol_features = features
        for request, count in counters:
            self.counters[request_name(request) if request else "refused"] = count

    def _run(self) -> None:
        while self._open and self._waiting is None and self._step():
            pass

    def _step(self) -> bool:
        """Parse the next header or carry out the next message; False when more bytes are due."""
        if self._header is None:
            if len(self._buffer) < _HEADER:
                return False
            self._header = VhostUserHeader.parse(self._buffer[:_HEADER])
            self._check_header(self._header)
            return self._open
        whole = _HEADER + self._header.size
        if len(self._buffer) < whole:
            return False
        payload = bytes(self._buffer[_HEADER:whole])
        del self._buffer[:whole]
        header, self._header = self._header, None
        fds, self._fds = self._fds, Fds()
        try:
            self._carry_out(header, payload, fds)
        finally:
            fds.close()
        return True

    def _check_header(self, header: VhostUserHeader) -> None:
        name = request_name(header.request)
        if header.flags & HeaderFlag.VERSION_MASK != VERSION:
            self._fail(ProtocolError("message-version", f"{name}: flags {header.flags:#x}"))
        elif header.flags & HeaderFlag.REPLY or header.flags & ~_KNOWN_FLAGS:
            self._fail(ProtocolError("message-flags", f"{name}: flags {header.flags:#x}"))
        elif header.size > MAX_PAYLOAD:
            self._fail(ProtocolError("message-size", f"{name}: {header.size} bytes"))

    # -- one message --------------------------------------------------------------------------

    def _carry_out(self, header: VhostUserHeader, payload: bytes, fds: Fds) -> None:
        self.counters[request_name(header.request)] += 1
        wanted = self._ack_wanted(header)  # a message may be what ends or begins REPLY_ACK
        try:
            rule, handler = self._rule(header)
            message = self._parse(rule, header, payload, fds)
            answer = handler(message, fds)
        except PeerError as error:
            self._refuse(header, error, wanted)
        except Exception as error:  # our own fault: the front-end must not pay with a hang
            fault = internal_fault(error)
            self._fail(ProtocolError(fault.rule, f"{request_name(header.request)}: {fault.detail}"))
        else:
            self._answer(header, answer, wanted or self._ack_wanted(header))

    def _rule(self, header: VhostUserHeader) -> tuple[MessageRule, Handler]:
        """Return the rule and the handler of a request that is known and negotiated."""
        try:
            request = Request(header.request)
            rule, handler = MESSAGES[request], self._handlers[request]
        except (ValueError, KeyError):
            raise ProtocolError("request-unknown", request_name(header.request)) from None
        if rule.feature is not None:
            known = self.offered if rule.offered else self.protocol_features
            if rule.feature not in known:
                raise ProtocolError("request-not-negotiated", request.name)
        return rule, handler

    def _parse(
        self, rule: MessageRule, header: VhostUserHeader, payload: bytes, fds: Fds
    ) -> WireStruct | list[Any] | None:
        name = request_name(header.request)
        fewest, most = rule.fds
        if len(fds) > most:
            raise ProtocolError("fds-surplus", f"{name}: {len(fds)}, at most {most}")
        if len(fds) < fewest:
            raise ProtocolError("fds-missing", f"{name}: {len(fds)}, at least {fewest}")
        try:
            parsed: WireStruct | list[Any] | None = rule.parse(payload)
        except WireError as error:
            raise ProtocolError("payload-size", f"{name}: {error}") from None
        return parsed

    def _get_protocol_features(self, _: None, __: Fds) -> Reply:
        return u64(self.offered)

    def _set_protocol_features(self, message: VhostUserU64, _: Fds) -> None:
        surplus = message.u64 & ~int(self.offered)
        if surplus:
            raise ProtocolError("protocol-features-not-offered", f"{surplus:#x}")
        wanted, needs = ProtocolFeature(message.u64), ProtocolFeature.INFLIGHT_SHMFD
        if ProtocolFeature.GET_VRING_BASE_INFLIGHT in wanted and needs not in wanted:
            raise ProtocolError("protocol-features", "GET_VRING_BASE_INFLIGHT alone")
        self.protocol_features = wanted

    # -- output -------------------------------------------------------------------------------

    def take_output(self) -> list[tuple[bytes, list[int]]]:
        """Return the messages to send with their descriptors, which the caller then owns."""
        output, self._output = self._output, []
        return output

    def finish(self, reply: Reply) -> None:
        """Send the reply that a handler deferred by :data:`LATER`, then continue with messages."""
        header, self._waiting = self._waiting, None
        if header is None:
            close_fds(reply.fds)
            return
        self._send(header, reply)
        self._run()

    @property
    def waiting(self) -> bool:
        """Whether an answer is still due (:meth:`finish`), and later messages wait for it."""
        return self._waiting is not None

    def _answer(self, header: VhostUserHeader, answer: Reply | _Later | None, wanted: bool) -> None:
        if isinstance(answer, Reply):
            self._send(header, answer)
        elif answer is LATER:
            self._waiting = header
        elif wanted:
            self._send(header, u64(0))

    def _refuse(self, header: VhostUserHeader, error: PeerError, wanted: bool) -> None:
        self.counters["refused"] += 1
        name = request_name(header.request)
        failure = self._failure(header, wanted)
        if failure is None:
            self._fail(ProtocolError(error.rule, error.detail or name))
        else:
            log.warning("%s refused: %s", name, error)
            self._send(header, failure)

    def _failure(self, header: VhostUserHeader, wanted: bool) -> Reply | None:
        """Return the reply that reports failure, or None if the message has no such reply."""
        request = header.request
        if request == Request.GET_CONFIG:  # "zero length of payload to indicate an error"
            return Reply(b"")
        if request == Request.GET_INFLIGHT_FD:  # no area: QEMU continues without one
            none = VhostUserInflight(mmap_size=0, mmap_offset=0, num_queues=0, queue_size=0)
            return Reply(none.build())
        if request == Request.SET_DEVICE_STATE_FD:
            return u64(STATE_FD_FAILURE)
        if request in (Request.CHECK_DEVICE_STATE, Request.IOTLB_MSG):
            return u64(FAILURE)
        rule = MESSAGES.get(Request(request)) if request in set(Request) else None
        if rule is not None and rule.reply is not None and request != Request.SET_LOG_BASE:
            return None
        return u64(FAILURE) if wanted else None

    def _ack_wanted(self, header: VhostUserHeader) -> bool:
        """Whether REPLY_ACK asks for an answer to a message that has none of its own."""
        return bool(
            header.flags & HeaderFlag.NEED_REPLY
            and ProtocolFeature.REPLY_ACK in self.protocol_features
        )

    def _send(self, header: VhostUserHeader, reply: Reply) -> None:
        head = VhostUserHeader(
            request=header.request, flags=VERSION | HeaderFlag.REPLY, size=len(reply.payload)
        )
        self._output.append((head.build() + reply.payload, reply.fds))

    def _fail(self, error: ProtocolError) -> None:
        """Log one line and end the session, whose stream can no longer be trusted."""
        if self._open:
            self.error = error
            self._open = False
            self._fds.close()
            self._buffer.clear()
            log.error("vhost-user connection closed: %s", error)
