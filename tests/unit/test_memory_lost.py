# SPDX-License-Identifier: Apache-2.0
"""A front-end takes guest memory away, or makes its eventfds block: the back-end stays alive."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.fakes.lost_memory import CASES
from tests.roots import REPOSITORY


@pytest.mark.parametrize("case", CASES)
def test_the_back_end_survives(case, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.lost_memory", case, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
