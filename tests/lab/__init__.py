# SPDX-License-Identifier: Apache-2.0
"""The lab: real QEMU and real Linux guests, fetched by package name, for tests, demo and
benchmarks.
"""

from __future__ import annotations

from tests.lab.agent import Guest, GuestError, Result
from tests.lab.cache import LabError, cache_dir
from tests.lab.guestkernels import NAMES, Built, Kernel, build_module, kernel, kernels
from tests.lab.machine import Machine
from tests.lab.provision import install_prerequisites, prerequisites, setup
from tests.lab.qemu import Config

__all__ = [
    "NAMES", "Built", "Config", "Guest", "GuestError", "Kernel", "LabError", "Machine", "Result",
    "build_module", "cache_dir", "install_prerequisites", "kernel", "kernels", "prerequisites",
    "setup",
]  # fmt: skip
