# SPDX-License-Identifier: Apache-2.0
"""``python -m vballoon``: the same as the program ``vballoon``."""

from __future__ import annotations

import sys

from vballoon.cli import main

sys.exit(main())
