# SPDX-License-Identifier: Apache-2.0
"""The suite as a pytest plugin: options, fixtures, time limits, and a record of what was seen.

``pytest --pyargs virtio_conformance --vhost-user SOCKET`` is all that it takes.  Without one
of the three options nothing of the suite is collected, so the plugin does not get in the way of
other tests of a project that has it installed.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from virtio_conformance.findings import Finding, Hang
from virtio_conformance.target import Options, Target, serves_once

SUITE = Path(__file__).parent / "suite"
OPTIONS = pytest.StashKey[Options]()
TARGETS = pytest.StashKey[list[Target]]()
FAILED = pytest.StashKey[bool]()
KEPT = pytest.StashKey[Target | None]()
SHOWN = 3
"""So many of a test's last connections are shown with its failure, and the first one."""
ONLY = {"test_vhost_user": "vhost-user", "test_vfio_user": "vfio-user", "test_pci": "vfio-user"}
"""Files of the suite that are about one transport, by the start of their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Command-line options, in a group of their own."""
    from virtio_conformance.options import OPTIONS as DECLARED

    group = parser.getgroup("conformance", "vhost-user and vfio-user conformance")
    for name, how in DECLARED.items():
        group.addoption(name, **how)
    group.addoption("--conformance-json", metavar="FILE", help="write the results there")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; register the mark."""
    config.addinivalue_line("markers", "requirement(id, ...): rows of the catalogue it checks")
    get = config.getoption
    protocol = "vfio-user" if get("vfio_user") else get("protocol")
    if get("vhost_user"):
        protocol = "vhost-user"
    socket, command = get("vhost_user") or get("vfio_user") or "", get("spawn") or ""
    config.stash[OPTIONS] = Options(
        protocol=protocol,
        socket=str(Path(socket).absolute()) if socket else "",
        command=command,
        before=get("before"),
        config_change=get("config_change"),
        device=get("device"),
        time_limit=get("time_limit"),
        answer_limit=get("answer_limit"),
        start_limit=get("start_limit"),
        polls=get("polls"),
        keep=get("keep"),
        discards=not get("no_discards"),
    )
    if get("conformance_json"):
        from virtio_conformance.record import Recorder, Run

        run = Run(protocol=protocol, device=get("device"), backend=command or socket)
        config.pluginmanager.register(Recorder(run, Path(get("conformance_json"))))


def repeat_command(options: Options, nodeid: str) -> str:
    """The line that runs one test again."""
    words = ["vballoon", "conform"]
    if options.command:
        words += ["--spawn", options.command]
        words += ["--protocol", options.protocol] if options.protocol != "vhost-user" else []
        words += ["--before", options.before] if options.before else []
        words += ["--config-change", options.config_change] if options.config_change else []
    else:
        words += [f"--{options.protocol}", options.socket]
    words += ["--device", options.device] if options.device != "none" else []
    words += ["--keep"] if options.keep else []
    words += ["--polls"] if options.polls else []
    words += ["--no-discards"] if not options.discards else []
    return shlex.join([*words, "--only", nodeid.rpartition("/")[2]])


# -- collection ------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without a backend the suite is not there; files of the other transport neither."""
    if collection_path.parent != SUITE or not collection_path.name.startswith("test_"):
        return None
    options = config.stash[OPTIONS]
    if not (options.socket or options.command):
        return True
    for start, protocol in ONLY.items():
        if collection_path.name.startswith(start) and protocol != options.protocol:
            return True
    return None


def _ours(item: pytest.Item) -> bool:
    return item.path.parent == SUITE


# -- running ---------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Learn what many tests need to know of the program, so that it is no test's time."""
    if any(map(_ours, session.items)) and not session.config.option.collectonly:
        serves_once(session.config.stash[OPTIONS])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that takes longer than the time limit is a finding, not the end of the run."""
    if not _ours(item):
        return (yield)
    limit = item.config.stash[OPTIONS].time_limit

    def expired(number: int, frame: FrameType | None) -> None:
        raise Hang(f"the test took longer than {limit} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say what was sent, what came back, which rule it is, and how to repeat it."""
    report: pytest.TestReport = yield
    if not _ours(item):
        return report
    ids = _requirements(item)
    report.user_properties.append(("requirement", ids))
    if report.failed:
        item.stash[FAILED] = True
        targets = item.stash.get(TARGETS, [])
        output = "".join(target.plain(target.output()[-2000:]) for target in targets)
        report.sections.append(("requirements", "\n".join(_rules(ids))))
        report.sections.append(("wire", "\n".join(_wire(targets))))
        report.sections.append(("backend", output))
        command = repeat_command(item.config.stash[OPTIONS], item.nodeid)
        report.sections.append(("repeat", command))
        if call.excinfo is not None and call.excinfo.errisinstance(Finding):
            told = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
            for target in targets:
                told = target.plain(told)
            report.longrepr = told
    return report


def _requirements(item: pytest.Item) -> list[str]:
    """Rows that the test checks, those of the other ring layout left out."""
    layout = getattr(getattr(item, "callspec", None), "params", {}).get("packed", "")
    other = {"split": "packed.", "packed": "split."}.get(layout, "-")
    ids = [str(a) for mark in item.iter_markers("requirement") for a in mark.args]
    return [name for name in ids if not name.startswith(other)]


def _wire(targets: list[Target]) -> list[str]:
    """What went over the connections; of many, the first and the last ones."""
    logs = [tap.log.lines() for target in targets for tap in target.taps]
    if len(logs) == 1:
        return logs[0]
    lines: list[str] = []
    for number, log in enumerate(logs, 1):
        if number == 1 or number > len(logs) - SHOWN:
            lines += [f"connection {number} of {len(logs)}:", *log]
    return lines


def _rules(ids: list[str]) -> list[str]:
    from virtio_conformance.requirements import by_id

    rows = [by_id()[name] for name in ids]
    return [f"{row.id} ({row.strength}; {row.label}): {row.text}" for row in rows]


# -- fixtures --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Options:
    """What the command line says."""
    return pytestconfig.stash[OPTIONS]


@pytest.fixture
def target(options: Options, request: pytest.FixtureRequest) -> Iterator[Target]:
    """The backend, started afresh where it is ours; its health is looked at in the end."""
    made = request.config.stash.get(KEPT, None) or Target(options)
    request.config.stash[KEPT] = None
    request.node.stash.setdefault(TARGETS, []).append(made)
    healthy = False
    try:
        yield made
        if not request.node.stash.get(FAILED, False):
            made.expect_healthy()
            healthy = True
    finally:
        made.taps.clear()
        if options.keep and healthy and not made.gone:
            request.config.stash[KEPT] = made
        else:
            made.stop()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End a backend that was kept."""
    kept = config.stash.get(KEPT, None)
    if kept is not None:
        kept.stop()


@pytest.fixture
def profile(options: Options) -> Any:
    """What a valid request is."""
    from virtio_conformance.profiles import find_profile

    return find_profile(options.device)()


@pytest.fixture
def new_rig(target: Target, profile: Any, options: Options) -> Iterator[Any]:
    """Makes devices over the transport under test; they are closed in the end."""
    from virtio_conformance.rig import Rig
    from virtio_conformance.rig_vfio_user import VfioUserRig
    from virtio_conformance.rig_vhost_user import VhostUserRig

    made: list[Any] = []

    def make(packed: bool = False, **how: Any) -> Any:
        kind: type[Rig] = VfioUserRig if options.protocol == "vfio-user" else VhostUserRig
        made.append(kind(target, profile, packed=packed, **how))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture(params=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    """The ring layout."""
    return bool(request.param == "packed")


@pytest.fixture
def rig(new_rig: Any, packed: bool) -> Any:
    """A device with the ring layout under test, connected and nothing more."""
    return new_rig(packed)


@pytest.fixture
def split_rig(new_rig: Any) -> Any:
    """A device that is driven with split rings."""
    return new_rig(False)


@pytest.fixture
def new_client(target: Target, options: Options) -> Iterator[Any]:
    """Makes vfio-user clients that have said nothing yet; they are closed in the end."""
    from virtio_conformance.vfio_user import Client

    made: list[Client] = []

    def make() -> Client:
        made.append(Client(target.connect(), options.answer_limit))
        target.taps.append(made[-1].tap)
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(new_client: Any) -> Any:
    """A vfio-user client that has said nothing yet."""
    return new_client()
