# SPDX-License-Identifier: Apache-2.0
"""DEVICE_FEATURE: migration states, the migration stream, and DMA logging."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from virtio_conformance.findings import Closed, Finding, not_applicable, preparing, require
from virtio_conformance.memory import PAGE
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.vfio_user import Answer, Client
from virtio_formats.vfio_user import (
    MIG_ARCS,
    Command,
    DeviceFeature,
    DeviceFlags,
    DeviceState,
    Feature,
    FeatureFlags,
    LoggingControl,
    LoggingRange,
    LoggingReport,
    MigData,
    Migration,
    MigrationFlags,
    MigState,
)

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
S = DeviceState


@pytest.fixture
def session(client: Client) -> Client:
    """Return a client that has negotiated and has reset what an earlier client left."""
    client.negotiate()
    if client.info().flags & DeviceFlags.RESET:
        client.do(Command.DEVICE_RESET)
    return client


def feature(
    client: Client, index: int, action: int, data: bytes = b"", argsz: int = 4096
) -> Answer:
    """Send one DEVICE_FEATURE command and return the reply."""
    head = DeviceFeature(argsz=argsz, flags=index | action).build()
    return client.ask(Command.DEVICE_FEATURE, head + data)


def need(client: Client, index: Feature, action: int) -> None:
    """Skip the test as not applicable unless the device has a feature."""
    if feature(client, index, PROBE | action).failed:
        not_applicable(f"device feature {index.name} is not supported")


def state(client: Client) -> int:
    """Return the migration state."""
    answer = feature(client, Feature.MIG_DEVICE_STATE, GET)
    require(not answer.failed, f"reading the state failed with errno {answer.error}")
    return MigState.parse(answer.payload[8:16]).device_state


def go(client: Client, to: int) -> Answer:
    """Ask for a migration state."""
    data = MigState(device_state=to, data_fd=0xFFFFFFFF).build()
    return feature(client, Feature.MIG_DEVICE_STATE, SET, data)


@pytest.mark.requirement("vf.feature.echo")
def test_probe_echoes(session: Client) -> None:
    """The reply to PROBE repeats the request; an unknown feature fails."""
    for index in (Feature.MIGRATION, Feature.MIG_DEVICE_STATE, Feature.DMA_LOGGING_START):
        answer = feature(session, index, PROBE | GET, argsz=8)
        if not answer.failed:
            due = DeviceFeature(argsz=8, flags=index | PROBE | GET).build()
            require(answer.payload[4:8] == due[4:], f"reply {answer.payload.hex()}")
    require(feature(session, 0x7777, PROBE | GET).failed, "feature 0x7777 is supported")
    require(feature(session, Feature.MIGRATION, 0).failed, "a command without an action succeeds")


@pytest.mark.requirement("vf.migration.stop-copy")
def test_migration_flags(session: Client) -> None:
    """STOP_COPY is among the migration flags."""
    need(session, Feature.MIGRATION, GET)
    answer = feature(session, Feature.MIGRATION, GET)
    require(not answer.failed, f"GET failed with errno {answer.error}")
    flags = Migration.parse(answer.payload[8:16]).flags
    require(flags & MigrationFlags.STOP_COPY, f"migration flags {flags:#x}")


def arcs(client: Client) -> list[tuple[int, int]]:
    """Return the arcs of this device; those of PRE_COPY only if it has that state."""
    answer = feature(client, Feature.MIGRATION, GET)
    pre_copy = Migration.parse(answer.payload[8:16]).flags & MigrationFlags.PRE_COPY
    return [arc for arc in MIG_ARCS if pre_copy or S.PRE_COPY not in arc]


def reachable(edges: list[tuple[int, int]], start: int) -> set[int]:
    """Return the states with a path from *start* that has no saving state in its interior."""
    found, front = {start}, [start]
    while front:
        here = front.pop(0)
        if here != start and here in (S.STOP_COPY, S.PRE_COPY):
            continue
        for a, b in edges:
            if a == here and b not in found:
                found.add(b)
                front.append(b)
    return found


@pytest.mark.requirement("vf.migration.path", "vf.migration.complete")
@pytest.mark.parametrize(
    "start", [S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING], ids=lambda s: s.name
)
@pytest.mark.parametrize("end", [S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING], ids=lambda s: s.name)
def test_transitions(session: Client, start: DeviceState, end: DeviceState) -> None:
    """Every transition that the arcs allow is done by the time of the reply."""
    need(session, Feature.MIG_DEVICE_STATE, SET)
    edges = arcs(session)
    if start == S.RESUMING and end != S.RESUMING:
        not_applicable("leaving RESUMING needs a state to load; another test does that")
    if start != S.RUNNING:
        require(not go(session, start).failed, f"RUNNING to {start.name} failed")
    answer = go(session, end)
    if end not in reachable(edges, start):
        require(answer.failed, f"{start.name} to {end.name} succeeds")
        return
    require(not answer.failed, f"{start.name} to {end.name} failed with errno {answer.error}")
    told = f"state {state(session)} after the reply, due is {end.name}"
    require(state(session) == end, told, row="vf.migration.complete")


@pytest.mark.requirement("vf.migration.no-backwards")
def test_transitions_that_are_not_allowed(session: Client) -> None:
    """STOP_COPY to PRE_COPY, ERROR, and numbers that are no state are refused."""
    need(session, Feature.MIG_DEVICE_STATE, SET)
    with preparing():
        require(not go(session, S.STOP_COPY).failed, "STOP_COPY failed")
    require(go(session, S.PRE_COPY).failed, "STOP_COPY to PRE_COPY succeeds")
    for number in (S.ERROR, 8, 0xFFFFFFFF):
        require(go(session, number).failed, f"state {number} can be asked for")
    require(state(session) == S.STOP_COPY, "a refused transition changed the state")


def stream(client: Client) -> bytes:
    """Return the whole migration stream, read in small pieces."""
    found = b""
    while True:
        answer = client.do(Command.MIG_DATA_READ, MigData(argsz=8 + 64, size=64).build())
        size = MigData.parse(answer.payload[:8]).size
        require(len(answer.payload) == 8 + size, f"{len(answer.payload)} bytes for {size} of data")
        found += answer.payload[8:]
        if size < 64:
            return found
        require(len(found) < 1 << 24, "the migration stream does not end")


@pytest.mark.requirement("vf.migration.complete")
def test_state_saved_and_loaded(new_rig: Callable[..., VfioUserRig]) -> None:
    """A loaded device continues at its ring positions; a stopped one does nothing."""
    rig = new_rig(False)
    need(rig.client, Feature.MIG_DEVICE_STATE, SET)
    rig.bring_up(size=16)
    rig.warm_up()
    require(not go(rig.client, S.STOP_COPY).failed, "STOP_COPY failed")
    saved = stream(rig.client)
    placed = rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    try:
        rig.kick(rig.profile.main)
    except Finding:
        pass
    rig.expect_quiet(0.1)
    rig.ram.expect_untouched(before, rig.main.publish_span)
    require(not go(rig.client, S.RESUMING).failed, "RESUMING failed")
    for start in range(0, len(saved), 50):
        part = saved[start : start + 50]
        body = MigData(argsz=8, size=len(part)).build() + part
        rig.client.do(Command.MIG_DATA_WRITE, body)
    require(not go(rig.client, S.RUNNING).failed, "RUNNING after loading failed")
    rig.kick(rig.profile.main)
    rig.check([placed], rig.collect(rig.main, 1))
    rig.run([rig.request(2)])


@pytest.mark.requirement("vf.migration.complete")
@pytest.mark.parametrize("what", ["garbage", "nothing", "flood"])
def test_loading_garbage(session: Client, what: str) -> None:
    """Malformed state is refused, and RESET leads back to RUNNING."""
    need(session, Feature.MIG_DEVICE_STATE, SET)
    require(not go(session, S.RESUMING).failed, "RESUMING failed")
    data = {"garbage": b"\xde\xad" * 400, "nothing": b"", "flood": bytes(1 << 16)}[what]
    try:
        for _ in range(64 if what == "flood" else 1):
            if data:
                body = MigData(argsz=8, size=len(data)).build() + data
                if session.ask(Command.MIG_DATA_WRITE, body).failed:
                    break
        require(go(session, S.RUNNING).failed, f"{what} is taken as device state")
    except Closed:
        return
    session.do(Command.DEVICE_RESET)
    require(state(session) == S.RUNNING, f"state {state(session)} after a reset")


# -- DMA logging -----------------------------------------------------------------------------


def start_log(rig: VfioUserRig, ranges: list[tuple[int, int]], page: int = PAGE) -> Answer:
    """Send DMA_LOGGING_START."""
    data = LoggingControl(page_size=page, num_ranges=len(ranges), reserved=0).build()
    data += b"".join(LoggingRange(iova=a, length=n).build() for a, n in ranges)
    return feature(rig.client, Feature.DMA_LOGGING_START, SET, data)


def report(rig: VfioUserRig, iova: int, length: int, page: int = PAGE) -> set[int]:
    """Return the written pages of DMA_LOGGING_REPORT; bits outside the range have to be zero."""
    data = LoggingReport(iova=iova, length=length, page_size=page).build()
    answer = feature(rig.client, Feature.DMA_LOGGING_REPORT, GET, data, argsz=1 << 16)
    require(not answer.failed, f"DMA_LOGGING_REPORT failed with errno {answer.error}")
    raw = np.frombuffer(answer.payload[32:], np.uint8)
    bits = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
    pages = -(-length // page)
    told = f"bit {bits[-1:]} of {pages} is set"
    require(not bits.size or int(bits[-1]) < pages, told, row="vf.log.zero-outside")
    return {iova + int(bit) * page for bit in bits}


@pytest.mark.requirement("vf.log.exact", "vf.log.zero-outside", "vf.log.page-size")
def test_dma_logging(new_rig: Callable[..., VfioUserRig], packed: bool) -> None:
    """Pages that the device wrote are reported, once; the used ring is among them."""
    rig = new_rig(packed)
    need(rig.client, Feature.DMA_LOGGING_START, SET)
    rig.bring_up(size=16)
    spans = [(region.guest, region.size) for region in rig.ram.regions]
    answer = start_log(rig, spans)
    require(not answer.failed, f"DMA_LOGGING_START failed with errno {answer.error}")
    placed = rig.request(0, align=PAGE)
    (used,) = rig.run([placed])
    found: set[int] = set()
    for iova, length in spans:
        found |= report(rig, iova, length)
    low = rig.main.device_span[0][0]
    require(low // PAGE * PAGE in found, f"the used ring at {low:#x} is not reported")
    for addr in range(placed.writable_at, placed.writable_at + used.len, PAGE):
        require(addr // PAGE * PAGE in found, f"written page {addr:#x} is not reported")
    again = {page for iova, length in spans for page in report(rig, iova, length)}
    require(not again, f"pages reported twice: {sorted(again)[:4]}", row="vf.log.exact")
    rig.run([rig.request(1)])
    for iova, length in spans:
        found |= report(rig, iova, length - 3 * PAGE)
    feature(rig.client, Feature.DMA_LOGGING_STOP, SET, bytes(16))
    rig.run([rig.request(2)])


@pytest.mark.requirement("vf.log.all")
def test_dma_logging_of_everything(new_rig: Callable[..., VfioUserRig]) -> None:
    """No ranges means that all writes are logged."""
    rig = new_rig(False)
    need(rig.client, Feature.DMA_LOGGING_START, SET)
    rig.bring_up(size=16)
    require(not start_log(rig, []).failed, "DMA_LOGGING_START without ranges failed")
    rig.run([rig.request(0)])
    low = rig.main.device_span[0][0] // PAGE * PAGE
    require(low in report(rig, 0, 2 << 20), "the used ring is not reported")


@pytest.mark.requirement("vf.robust.size")
@pytest.mark.parametrize(
    ("iova", "length", "page"),
    [
        (0, 1 << 63, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, PAGE),
        (0, PAGE, 0),
        (0, PAGE, 3),
        (0, 0, PAGE),
        (0, 1 << 40, 1),
    ],
)
def test_dma_log_reports_that_make_no_sense(
    new_rig: Callable[..., VfioUserRig], iova: int, length: int, page: int
) -> None:
    """Reports of absurd ranges are refused or harmless."""
    rig = new_rig(False)
    need(rig.client, Feature.DMA_LOGGING_START, SET)
    require(not start_log(rig, [(0, 2 << 20)]).failed, "DMA_LOGGING_START failed")
    data = LoggingReport(iova=iova, length=length, page_size=page).build()
    try:
        feature(rig.client, Feature.DMA_LOGGING_REPORT, GET, data, argsz=4096)
        start_log(rig, [(iova, length)] * 40, page)
    except Closed:
        pass
    rig.survive()


@pytest.mark.requirement("vf.robust.size")
@pytest.mark.parametrize("index", list(Feature), ids=lambda f: f.name)
@pytest.mark.parametrize("length", [0, 3, 100])
def test_features_with_wrong_payloads(session: Client, index: Feature, length: int) -> None:
    """Features set with too little or too much data do no harm."""
    for action in (GET, SET, GET | SET):
        try:
            feature(session, index, action, b"\xff" * length)
        except Closed:
            return
    session.usable()
