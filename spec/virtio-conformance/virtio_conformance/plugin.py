# SPDX-License-Identifier: Apache-2.0
"""The suite as a pytest plugin: options, fixtures, time limits, and a record of the results.

Run ``pytest --pyargs virtio_conformance --vhost-user SOCKET``.  Without one of the three options
nothing of the suite is collected, so that the plugin does not disturb the other tests of a project
that has it installed.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from virtio_conformance.findings import Crash, Finding, Hang, NotStarted
from virtio_conformance.requirements import Requirement, by_id
from virtio_conformance.target import Options, Target, serves_once

SUITE = Path(__file__).parent / "suite"
OPTIONS = pytest.StashKey[Options]()
TARGETS = pytest.StashKey[list[Target]]()
FAILED = pytest.StashKey[bool]()
KEPT = pytest.StashKey[Target | None]()
RIGS = pytest.StashKey[list[Any]]()
SHOWN = 3
"""How many of a test's last connections a failure shows, besides the first one."""
ONLY = {"test_vhost_user": "vhost-user", "test_vfio_user": "vfio-user", "test_pci": "vfio-user"}
"""The transport that files of the suite need, by the start of their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the command-line options, in a group of their own."""
    from virtio_conformance.options import OPTIONS as DECLARED

    group = parser.getgroup("conformance", "vhost-user and vfio-user conformance")
    for name, how in DECLARED.items():
        group.addoption(name, **how)
    group.addoption("--conformance-json", metavar="FILE", help="write the results there")
    group.addoption("--conformance-shard", metavar="I/N", help="run every Nth test, from the Ith")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options and register the mark."""
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
        hint_start=get("hint_start"),
        hint_done=get("hint_done"),
        device=get("device"),
        time_limit=get("time_limit"),
        answer_limit=get("answer_limit"),
        start_limit=get("start_limit"),
        polls=get("polls"),
        keep=get("keep"),
        discards=not get("no_discards"),
        robustness=not get("no_robustness"),
        spec=get("spec"),
    )
    if get("conformance_json"):
        from virtio_conformance.record import Recorder, Run

        run = Run(protocol=protocol, device=get("device"), backend=command or socket)
        config.pluginmanager.register(Recorder(run, Path(get("conformance_json"))))


def repeat_command(options: Options, nodeid: str) -> str:
    """Return the command line that runs one test again."""
    words = ["virtio-conformance"]
    if options.command:
        words += ["--spawn", options.command]
        words += ["--protocol", options.protocol] if options.protocol != "vhost-user" else []
        words += ["--before", options.before] if options.before else []
        words += ["--config-change", options.config_change] if options.config_change else []
        words += ["--hint-start", options.hint_start] if options.hint_start else []
        words += ["--hint-done", options.hint_done] if options.hint_done else []
    else:
        words += [f"--{options.protocol}", options.socket]
    words += ["--device", options.device] if options.device != "none" else []
    words += ["--keep"] if options.keep else []
    words += ["--polls"] if options.polls else []
    words += ["--no-discards"] if not options.discards else []
    words += ["--spec", options.spec] if options.spec != Options.spec else []
    return shlex.join([*words, "--only", nodeid.rpartition("/")[2]])


# -- collection ------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the suite if no back-end is given, and the files of the other transport."""
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that the options exclude, and those of other shards."""
    options = config.stash[OPTIONS]
    chosen = [item for item in items if not _ours(item) or _asked_for(item, options)]
    shard = config.getoption("conformance_shard")
    if shard:
        number, _, count = shard.partition("/")
        chosen = chosen[int(number) :: int(count)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _asked_for(item: pytest.Item, options: Options) -> bool:
    """Return whether a test has a row that this run decides."""
    rows = [by_id()[name] for name in _requirements(item)]
    robust = options.robustness or any(row.chapter != "robustness" for row in rows)
    return robust and any(row.in_version(options.spec) for row in rows)


# -- running ---------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Learn what many tests need to know of the program.  End the run if it does not start."""
    if any(map(_ours, session.items)) and not session.config.option.collectonly:
        from virtio_conformance.learn import learn
        from virtio_conformance.probe import probe

        try:
            probe(session.config.stash[OPTIONS])
        except NotStarted as reason:
            pytest.exit(str(reason), returncode=2)
        serves_once(session.config.stash[OPTIONS])
        learn(session.config.stash[OPTIONS])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Report a test that exceeds the time limit as a finding, and continue the run."""
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
    """Attach the messages, the broken row, and the command that repeats the test."""
    report: pytest.TestReport = yield
    if not _ours(item):
        return report
    ids = _requirements(item)
    report.user_properties.append(("requirement", ids))
    if report.failed and call.excinfo is not None:
        item.stash[FAILED] = True
        _attach(item, report, call.excinfo.value, ids)
    return report


def _attach(
    item: pytest.Item, report: pytest.TestReport, error: BaseException, ids: list[str]
) -> None:
    """Add the messages, rings, output and command of a failure to its report."""
    targets = item.stash.get(TARGETS, [])
    broken = broken_row(error, str(report.when), ids)
    report.user_properties.append(("broken", broken))
    output = "".join(target.plain(target.output()[-2000:]) for target in targets)
    rings = "\n".join(line for rig in item.stash.get(RIGS, []) for line in rig.describe())
    command = repeat_command(item.config.stash[OPTIONS], item.nodeid)
    report.sections += [
        ("requirements", "\n".join(_rules([broken] if broken else ids))),
        ("wire", "\n".join(_wire(targets))),
        ("rings", rings),
        ("backend", output),
        ("repeat", command),
    ]
    if isinstance(error, (Finding, NotStarted)):
        told = f"{type(error).__name__}: {error}"
        for target in targets:
            told = target.plain(told)
        report.longrepr = told


def broken_row(error: BaseException, when: str, ids: list[str]) -> str:
    """Return the row that *error* accuses the back-end of breaking; empty for none.

    *ids* are the rows of the test, the first of which is what it is about.  Errors in set-up, and
    errors of the suite itself, accuse nobody.
    """
    if not isinstance(error, Finding) or (when == "setup" and not error.row):
        return ""
    if error.row:
        return error.row
    if isinstance(error, Crash) and not (ids and by_id()[ids[0]].chapter == "robustness"):
        return "program.healthy"
    return "" if error.inconclusive or when == "teardown" else next(iter(ids), "")


def _requirements(item: pytest.Item) -> list[str]:
    """Return the rows that the test checks, without those of the other layout and transport."""
    layout = getattr(getattr(item, "callspec", None), "params", {}).get("packed", "")
    other: tuple[str, ...] = {"split": ("packed.",), "packed": ("split.",)}.get(layout, ())
    foreign = {"vfio-user": ("vu.",), "vhost-user": ("vf.", "pci.")}
    other += foreign[item.config.stash[OPTIONS].protocol]
    ids = [str(a) for mark in item.iter_markers("requirement") for a in mark.args]
    return [name for name in ids if not name.startswith(other)]


def _wire(targets: list[Target]) -> list[str]:
    """Return the messages of each connection; of many connections, the first and the last ones."""
    logs = [tap.log.lines() for target in targets for tap in target.taps]
    if len(logs) == 1:
        return logs[0]
    lines: list[str] = []
    for number, log in enumerate(logs, 1):
        if number == 1 or number > len(logs) - SHOWN:
            lines += [f"connection {number} of {len(logs)}:", *log]
    return lines


def _rules(ids: list[str]) -> list[str]:
    rows: list[Requirement] = [by_id()[name] for name in ids]
    return [f"{row.id} ({row.strength}; {row.label}): {row.text}" for row in rows]


# -- fixtures --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Options:
    """Return the options of the command line."""
    return pytestconfig.stash[OPTIONS]


@pytest.fixture
def target(options: Options, request: pytest.FixtureRequest) -> Iterator[Target]:
    """Yield the back-end, started afresh if the suite starts it; check its health afterwards."""
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
    """Stop a back-end that was kept."""
    kept = config.stash.get(KEPT, None)
    if kept is not None:
        kept.stop()


@pytest.fixture
def profile(options: Options) -> Any:
    """Return the profile of the device under test."""
    from virtio_conformance.profiles import find_profile

    return find_profile(options.device)()


@pytest.fixture
def new_rig(
    target: Target, profile: Any, options: Options, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Return a function that connects to the device over the transport under test."""
    from virtio_conformance.learn import learn, rig_kind

    made: list[Any] = request.node.stash.setdefault(RIGS, [])

    def make(packed: bool = False, **how: Any) -> Any:
        rig = rig_kind(options)(target, profile, packed=packed, **how)
        learned = learn(options)
        rig.frees, rig.frees_reports = learned.frees, learned.numbering.frees
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def numbering(options: Options, request: pytest.FixtureRequest) -> Any:
    """Return the numbers of a balloon's optional queues."""
    from virtio_conformance.learn import learn

    found = learn(options).numbering
    request.node.user_properties.append(("note", str(found)))
    return found


@pytest.fixture(params=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    """Return whether the test uses packed rings; each test runs with both layouts."""
    return bool(request.param == "packed")


@pytest.fixture
def rig(new_rig: Any, packed: bool) -> Any:
    """Return a connected device with the ring layout under test.  Nothing is negotiated yet."""
    return new_rig(packed)


@pytest.fixture
def split_rig(new_rig: Any) -> Any:
    """Return a connected device that is driven with split rings."""
    return new_rig(False)


@pytest.fixture
def new_client(target: Target, options: Options) -> Iterator[Any]:
    """Yield a function that connects vfio-user clients; close them at the end."""
    from virtio_conformance.vfio_user import Client

    made: list[Client] = []

    def make() -> Client:
        made.append(Client(target.connect(), options.answer_limit, target.first_limit))
        target.taps.append(made[-1].tap)
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(new_client: Any) -> Any:
    """Return a vfio-user client that has sent nothing yet."""
    return new_client()
