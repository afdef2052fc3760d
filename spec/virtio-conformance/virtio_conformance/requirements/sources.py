# SPDX-License-Identifier: Apache-2.0
"""Find the normative statements in the sources of the specifications and count them.

The sources are not part of this project.  ``index.json`` has, for every block of device
requirements, the strengths of its statements in order and a digest.  The catalogue can therefore
be checked for completeness without the sources, and the digests show what a new revision of a
specification changed.

A *statement* is one occurrence of a requirement word (MUST, SHOULD NOT, MAY, ...).  In the virtio
sources the device's statements are in ``\\devicenormative`` blocks.  The two QEMU documents
describe both sides in running text, so that every sentence with such a word counts, section by
section.
"""

from __future__ import annotations

import hashlib
import html
import html.parser
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = (
    "VIRTIO_FILES",
    "Block",
    "html_blocks",
    "plain_html",
    "plain_tex",
    "read_blocks",
    "virtio_blocks",
)

VIRTIO_FILES = {
    "virtio_basic": "content.tex",
    "virtio_split": "split-ring.tex",
    "virtio_packed": "packed-ring.tex",
    "virtio_pci": "transport-pci.tex",
    "virtio_balloon": "device-types/balloon/description.tex",
}
"""Chapter of the catalogue, and the file of the virtio sources that it covers."""

_HEADING = re.compile(
    r"\\(?:(?P<kind>device|driver)normative|chapter|(?:sub)*section|(?:sub)?paragraph)\b"
)
_LABEL = re.compile(r"\\devicenormative\{[^}]*\}\s*\{[^}]*\}\s*\{(?P<label>[^}]*)\}", re.DOTALL)
_BARE_LABEL = re.compile(r"\\label\{devicenormative:(?P<label>[^}]*)\}", re.DOTALL)
_WORD = re.compile(r"\b(MUST|SHOULD|SHALL|MAY|CAN|RECOMMENDED|REQUIRED|OPTIONAL)\b(\s+NOT\b)?")
_MEANING = {
    "SHALL": "MUST",
    "REQUIRED": "MUST",
    "CAN": "MAY",
    "RECOMMENDED": "SHOULD",
    "OPTIONAL": "MAY",
}


@dataclass(frozen=True)
class Block:
    """One run of requirements under one label (or section title)."""

    label: str
    strengths: tuple[str, ...]
    sha256: str
    line: int = 0
    """Where the block begins in its TeX file; 0 for a manual page."""

    @classmethod
    def of(cls, label: str, text: str, line: int = 0) -> Block:
        """Return the block of *text*.  The digest ignores how the lines are wrapped."""
        flat = " ".join(text.split())
        found = tuple(_strength(match) for match in _WORD.finditer(flat))
        digest = hashlib.sha256(flat.encode()).hexdigest()[:16]
        return cls(" ".join(label.split()), found, digest, line)


def _strength(match: re.Match[str]) -> str:
    word = _MEANING.get(match[1], match[1])
    return f"{word} NOT" if match[2] else word


def virtio_blocks(source: str) -> list[Block]:
    """Return the device requirement blocks of one TeX file, in order."""
    blocks: list[Block] = []
    label, lines, begin = "", list[str](), 0
    for number, line in enumerate([*source.splitlines(), "\\section{end}"], 1):
        heading = _HEADING.match(line)
        bare = line.startswith("\\label{devicenormative:")
        if (heading or bare) and label:
            blocks.append(_finished(lines, begin))
            label = ""
        if bare or (heading and heading["kind"] == "device"):
            label, lines, begin = "pending", [], number
        lines.append(line)
    return blocks


def _finished(lines: list[str], begin: int) -> Block:
    text = "\n".join(lines)
    found = _LABEL.match(text) or _BARE_LABEL.match(text)
    if found is None:
        raise ValueError(f"no label at {lines[0]!r}")
    return Block.of(found["label"], text[found.end() :], begin)


class _Sections(html.parser.HTMLParser):
    """Splits a Sphinx page into (section title, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch("h[1-6]", tag):
            self._heading = True
            self.sections.append(("", []))
        elif tag == "dt":  # a message is a definition list entry of its own
            self.sections[-1][1].append("\n\x00")
        elif tag in {"p", "li", "dd"}:
            self.sections[-1][1].append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch("h[1-6]", tag):
            self._heading = False
        elif tag == "dt":
            self.sections[-1][1].append("\x00\n")

    def handle_data(self, data: str) -> None:
        title, text = self.sections[-1]
        if self._heading:
            self.sections[-1] = (title + data, text)
        else:
            text.append(data)


_MODAL = re.compile(r"\b(?:must|shall|should)\b", re.IGNORECASE)


def html_blocks(page: str) -> list[Block]:
    """Return the statements of a page of QEMU's interop manual, by section or message name.

    A definition-list term in capitals (``VHOST_USER_SET_FEATURES``) starts a block of its own.
    """
    parser = _Sections()
    parser.feed(page)
    blocks: list[Block] = []
    message = ""
    for heading, chunks in parser.sections:
        title = _clean(heading)
        if title in {"Request", "Reply"}:  # a part of the message above it
            title = f"{message} / {title}"
        else:
            message = title
        parts = re.split(r"\n\x00(VHOST_USER_[A-Z_0-9]+)[^\x00]*\x00\n", "".join(chunks))
        for name, text in zip([title, *parts[1::2]], parts[0::2], strict=True):
            flat = " ".join(re.sub("\x00", "", text).split())
            words = tuple(_modal(flat, match) for match in _MODAL.finditer(flat))
            if words:
                digest = hashlib.sha256(flat.encode()).hexdigest()[:16]
                blocks.append(Block(name, words, digest))
    return blocks


def _modal(text: str, match: re.Match[str]) -> str:
    word = {"shall": "MUST"}.get(match[0].lower(), match[0].upper())
    return f"{word} NOT" if re.match(r"\s+not\b", text[match.end() :], re.IGNORECASE) else word


def _clean(title: str) -> str:
    return " ".join(re.sub("[\uf0c1¶]", "", title).split())


def plain_tex(text: str) -> str:
    """Return the words of a TeX source, without the marks of fields, on one line."""
    text = re.sub(r"\\(?:field|emph)\{([^}]*)\}", r"\1", text)
    return " ".join(re.sub(r"\\item(?:\[[^\]]*\])?|[~]", " ", text).split())


def plain_html(page: str) -> str:
    """Return the words of a manual page on one line."""
    text = re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def read_blocks(path: Path) -> list[Block]:
    """Return the blocks of a source file, by its suffix (``.tex`` or ``.html``)."""
    text = path.read_text(encoding="utf-8")
    return virtio_blocks(text) if path.suffix == ".tex" else html_blocks(text)
