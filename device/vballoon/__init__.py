# SPDX-License-Identifier: Apache-2.0
"""A virtio-balloon device that runs outside the virtual machine monitor.

``docs/architecture.md`` lists the rooms and what each may import, and
``tests/unit/test_layering.py`` enforces it.
"""

from __future__ import annotations

__all__ = ("__version__",)

__version__: str
"""The version of the installed distribution; ``pyproject.toml`` is the only place to change it."""


def __getattr__(name: str) -> str:
    """Look the version up when it is used: loading the metadata reader takes 20 ms."""
    if name != "__version__":
        raise AttributeError(f"module 'vballoon' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vballoon")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"
