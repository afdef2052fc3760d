# SPDX-License-Identifier: Apache-2.0
"""A device as a program of its own."""

from __future__ import annotations

import sys

from gadget import Gadget

from vfio_user import run_program

if __name__ == "__main__":
    sys.exit(run_program(Gadget()))
