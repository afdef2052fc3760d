# SPDX-License-Identifier: Apache-2.0
"""Run the program ``vballoon`` as ``python -m vballoon``."""

from __future__ import annotations

import sys

from vballoon.cli import main

sys.exit(main())
