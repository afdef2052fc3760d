# SPDX-License-Identifier: Apache-2.0
"""The command-line options, declared once for the command and for the pytest plugin."""

from __future__ import annotations

from typing import Any

from virtio_conformance.profiles import PROFILES, profile_named

__all__ = ("OPTIONS",)

OPTIONS: dict[str, dict[str, Any]] = {
    "--vhost-user": {
        "metavar": "SOCKET",
        "help": "test the vhost-user back-end that listens there",
    },
    "--vfio-user": {"metavar": "SOCKET", "help": "test the vfio-user server that listens there"},
    "--spawn": {
        "metavar": "COMMAND",
        "help": "start a fresh back-end for every test; {socket} and {dir} are filled in",
    },
    "--protocol": {
        "choices": ["vhost-user", "vfio-user"],
        "default": "vhost-user",
        "help": "what the spawned back-end speaks (default: %(default)s)",
    },
    "--before": {
        "metavar": "SHELL",
        "default": "",
        "help": "shell command that prepares {dir} before every start",
    },
    "--config-change": {
        "metavar": "SHELL",
        "default": "",
        "help": "shell command that makes the device change its configuration; {dir}, {n}",
    },
    "--hint-start": {
        "metavar": "SHELL",
        "default": "",
        "help": "shell command that starts a round of free page hinting; {dir}",
    },
    "--hint-done": {
        "metavar": "SHELL",
        "default": "",
        "help": "shell command that ends the round of hinting; {dir}",
    },
    "--device": {
        "type": profile_named,
        "default": "none",
        "metavar": "TYPE",
        "help": f"device profile, which knows a valid request: {', '.join(sorted(PROFILES))},"
        " or FILE.py:CLASS (default: control plane only)",
    },
    "--no-robustness": {
        "action": "store_true",
        "help": "send nothing malformed; check the specifications only",
    },
    "--spec": {
        "choices": ["1.2", "1.3", "1.4"],
        "default": "1.4",
        "help": "version of the virtio standard (default: %(default)s)",
    },
    "--time-limit": {
        "type": float,
        "default": 10.0,
        "metavar": "SECONDS",
        "help": "for one test (default: %(default)s)",
    },
    "--answer-limit": {
        "type": float,
        "default": 2.0,
        "metavar": "SECONDS",
        "help": "for one answer (default: %(default)s)",
    },
    "--start-limit": {
        "type": float,
        "default": 10.0,
        "metavar": "SECONDS",
        "help": "for a back-end to listen (default: %(default)s)",
    },
    "--keep": {
        "action": "store_true",
        "help": "keep a spawned back-end while tests pass: faster, and it serves many front-ends",
    },
    "--polls": {
        "action": "store_true",
        "help": "the back-end polls its rings: a busy processor is not a finding",
    },
    "--no-discards": {
        "action": "store_true",
        "help": "the balloon was started with discards switched off",
    },
}
"""Option → keyword arguments of ``add_argument``; the defaults make an idle plugin."""
