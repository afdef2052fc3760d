# SPDX-License-Identifier: Apache-2.0
"""A back-end whose process cannot be observed is not accused of having ended or of a leak."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from virtio_conformance.observe import Process
from virtio_conformance.target import Options, Target

ELSEWHERE = Process(0)
"""What SO_PEERCRED gives for a process in another pid namespace."""


def test_a_process_in_another_namespace_counts_as_running() -> None:
    assert ELSEWHERE.alive
    target = Target(Options(protocol="vhost-user", socket="/nowhere"))
    target.process = ELSEWHERE
    assert not target.gone
    target.expect_healthy()


@pytest.mark.parametrize("figure", ["fds", "resident_bytes", "mappings"])
def test_figures_of_an_unseen_process_are_not_applicable(figure: str) -> None:
    words = ["memory"] if figure == "mappings" else []
    with pytest.raises(pytest.skip.Exception, match="another pid namespace"):
        getattr(ELSEWHERE, figure)(*words)


def test_an_unseen_process_uses_no_time_that_is_known() -> None:
    assert ELSEWHERE.cpu_seconds() == 0
    assert ELSEWHERE.settles()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look at every process")
def test_the_process_of_another_user_is_not_applicable() -> None:
    with pytest.raises(pytest.skip.Exception, match="another user"):
        Process(1).fds()


def test_our_own_process_and_one_that_has_ended() -> None:
    assert Process(os.getpid()).fds()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    gone = Process(child.pid)
    assert not gone.alive
    assert gone.fds() == []
