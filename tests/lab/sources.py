# SPDX-License-Identifier: Apache-2.0
"""Where this machine gets Debian from: its own apt configuration, read and not guessed.

The lab needs suites that the host may not list (trixie on a bookworm host), from the mirror that
the host does list. Both of apt's formats are read: one-line (``deb [options] URI suite
component...``) and deb822.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cache import LabError

RELEASES = ("buster", "bullseye", "bookworm", "trixie", "forky", "duke")
SUITES = frozenset(RELEASES) | {"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Source:
    """One archive of the host's configuration."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]

    def is_debian(self) -> bool:
        """Return whether this is Debian's main archive of a release, without updates."""
        return "main" in self.components and any(suite in SUITES for suite in self.suites)


def one_line(text: str) -> Iterator[Source]:
    """Return the sources of a ``sources.list`` file."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.split("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield Source(words[1], (words[2],), tuple(words[3:]))


def deb822(text: str) -> Iterator[Source]:
    """Return the sources of a ``.sources`` file."""
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields.setdefault(name, []).extend(line.split())
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.split()
        if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"])[0].lower() != "no":
            for uri in fields.get("uris", []):
                yield Source(
                    uri, tuple(fields.get("suites", ())), tuple(fields.get("components", ()))
                )


def host_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every enabled binary archive that apt on this machine knows."""
    found: list[Source] = []
    lists = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    for path in lists:
        if path.is_file():
            found += one_line(path.read_text(errors="replace"))
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        found += deb822(path.read_text(errors="replace"))
    return found


def debian_mirror(etc: Path = Path("/etc/apt")) -> str:
    """Return the URI of the host's Debian mirror; ``$VBALLOON_LAB_MIRROR`` overrides it."""
    named = os.environ.get("VBALLOON_LAB_MIRROR")
    if named:
        return named
    for source in host_sources(etc):
        if source.is_debian():
            return source.uri
    raise LabError(
        "this machine's apt configuration lists no Debian mirror; run the lab on a Debian host, or "
        "name a mirror in VBALLOON_LAB_MIRROR"
    )


def keyring() -> Path:
    """Return the keys that Debian's archives are verified with."""
    if not KEYRING.is_file():
        raise LabError("Debian's archive keys are missing: apt-get install debian-archive-keyring")
    return KEYRING
