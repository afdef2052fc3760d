# SPDX-License-Identifier: Apache-2.0
"""Choose how random tests draw their examples, for unit, lab and conformance tests alike.

``make test`` draws the same examples on every run, so that one commit has one result. ``FULL=1``
draws fresh ones; a failing example found there becomes an explicit ``@example`` of its test.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("fresh", derandomize=False, print_blob=True)
settings.load_profile("fresh" if os.environ.get("FULL") else "fixed")
