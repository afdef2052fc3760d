# SPDX-License-Identifier: Apache-2.0
"""Take a snapshot: the two orders of steps, and the way back where one fails."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vballoon.errors import UsageError, VballoonError
from vballoon.snapshot import live, steps
from vballoon.snapshot.journal import FLAGS, Entry, Journal
from vballoon.snapshot.recovery import undo
from vballoon.snapshot.run import Options, Step

if TYPE_CHECKING:
    from vballoon.snapshot.run import Run
    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("COLD", "LIVE", "MOVE", "steps_table", "take", "way")

_LOOK = Step("look", "find out what QEMU and the back-end have; nothing is changed yet", steps.look)
_GUARD = Step("guard", "lock the VM, open the journal, start the guardian", steps.guard)
_CHECK = Step("check", "that nobody else has resumed the guest meanwhile", steps.check)
_UNPLUG = Step("unplug", "the balloon, because QEMU does not save a machine with it", steps.unplug)
_PREPARE = Step("prepare", "give QEMU a file for the device state", steps.prepare)
_SAVE = (
    Step("state", "QEMU writes the state of its devices", steps.state),
    Step("verify", "read from guest memory which pages are in its free lists", steps.verify),
)
_RESUME = (
    Step("resume", "the guest", steps.resume),
    Step("plug", "the balloon in again, with the same back-end", steps.plug),
    Step("finish", "checksums, everything synced to disk, the manifest last", steps.finish),
)
_END = (
    Step("finish", "checksums, everything synced to disk, the manifest last", steps.finish),
    Step("hand over", "note that the snapshot is the machine from now on", steps.hand_over),
    Step("end", "QEMU", steps.end),
)
_MOVE = (
    Step("finish", "checksums, the rest of the snapshot, the manifest last", steps.finish),
    Step("offer", "wait until the destination has checked it and has it on disk", steps.offer),
    Step("commit", "note *gone*, send COMMIT, wait until the guest runs there", steps.commit),
    Step("end", "QEMU", steps.end),
)
_COLD = (
    _LOOK,
    _GUARD,
    _UNPLUG,
    _PREPARE,
    Step("stop", "the guest", steps.stop),
    *_SAVE,
    Step("copy", "all data of guest memory except its free pages", steps.copy),
    _CHECK,
)
_LIVE = (
    _LOOK,
    _GUARD,
    Step("track", "writes, from before the guest is asked for its free pages", live.track),
    Step("ask", "the guest for its free pages: a walk, or with --hint free page hinting", live.ask),
    _UNPLUG,
    _PREPARE,
    Step("rounds", "copy while the guest runs, again what was written, then stop it", live.rounds),
    *_SAVE,
    Step("copy", "what was written since the last round; blank what is a hole now", live.copy_rest),
    _CHECK,
)
COLD = _COLD + _RESUME
"""The steps of a snapshot for which the guest is stopped."""
MOVE = _COLD + _MOVE
"""The steps of a move."""
LIVE = _LIVE + _RESUME
"""The steps of a snapshot that copies most of the memory while the guest runs."""


def way(options: Options) -> tuple[Step, ...]:
    """Return the steps of a snapshot with *options*."""
    if options.move:
        return MOVE
    return (_LIVE if options.live else _COLD) + (_END if options.quit else _RESUME)


def steps_table(way: tuple[Step, ...]) -> str:
    """Return the Markdown table of the steps of *way*, for the documentation."""
    rows = [f"| {step.name} | {step.what} |" for step in way]
    return "\n".join(["| step | what |", "| --- | --- |", *rows]) + "\n"


def take(run: Run) -> SnapshotManifest:
    """Carry out *run*. Return the manifest.

    Where a step fails, the guest runs on with its balloon and the store is discarded.  Raise
    :class:`~vballoon.errors.VballoonError`.
    """
    run.journal = Journal(Entry(run.vm.path))
    try:
        for step in way(run.options):
            run.begin(step.name)
            step.do(run)
        run.begin("done")
    except BaseException as error:
        _go_back(run)
        if isinstance(error, OSError):
            raise UsageError(f"cannot write the snapshot: {error}") from None
        raise
    finally:
        if run.guardian is not None:
            run.guardian.dismiss()
        if run.lock >= 0:
            os.close(run.lock)
            run.lock = -1
    return run.manifest


def _go_back(run: Run) -> None:
    entry = run.journal.entry
    if run.sender is not None and not entry.gone:
        run.sender.abort()  # before the guest is resumed here
    troubles, left = undo(run.vm, entry)
    if not entry.over:  # otherwise the snapshot is all that is left of this machine
        run.store.discard()
    if run.guardian is not None:
        with contextlib.suppress(VballoonError, OSError):
            run.journal.write(**{name: getattr(left, name) for name in FLAGS})
        if left.unplug and not (left.gone or left.over):
            run.guardian.leave(run.journal.entry)
            troubles.append(f"process {run.guardian.pid} waits for the guest")
    for trouble in troubles:
        run.observer.say(trouble)
