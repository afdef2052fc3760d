# SPDX-License-Identifier: Apache-2.0
"""The vfio-user client for tests: :mod:`vfio_user.testing` under the names that tests use."""

from __future__ import annotations

from vfio_user.testing import (
    QEMU_VERSION_DATA,
    LocalClient,
    Ram,
    Reply,
    events,
    message,
    split,
)

__all__ = ("QEMU_VERSION_DATA", "FakeClient", "Ram", "Reply", "events", "message", "split")

FakeClient = LocalClient
