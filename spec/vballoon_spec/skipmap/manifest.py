# SPDX-License-Identifier: Apache-2.0
"""``manifest.json`` of an exported skip bitmap, version 1: typed, and checked when read.

``README.md`` in this folder describes the fields.  A missing field or one of the wrong type is an
error that names it.  Unknown keys are ignored; an unknown version is refused.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

__all__ = (
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "PAGE_SIZE",
    "PROVENANCES",
    "BitmapFile",
    "Manifest",
    "ManifestError",
    "ManifestRegion",
    "ManifestRound",
    "page_sums",
)

FORMAT_NAME = "vballoon-skip-bitmap"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PAGE_SIZE = 4096
"""Bytes of guest memory for each bit; fixed in version 1."""
PROVENANCES = ("ballooned", "reported", "hinted", "walked")
SAFETY_RULE = (
    "A set bit of hinted or walked may be used only where writes have been tracked since before "
    "the round's 'published' time, with every page written since removed, or on a stopped guest "
    "after verification; never for a round that is void."
)
_ADDRESS_END = 1 << 64
T = TypeVar("T")


class ManifestError(ValueError):
    """Report a manifest that must not be used; the text names the field."""


@dataclass(frozen=True, slots=True)
class BitmapFile:
    """One raw bitmap: a region's bits of one provenance, in the layout of KVM_GET_DIRTY_LOG."""

    file: str
    """Name within the directory."""
    bytes: int
    """Size of the file in bytes: 8 for every 64 pages, rounded up."""
    sha256: str
    """SHA-256 of the whole file, in lower-case hexadecimal."""
    pages: int
    """Number of bits set."""


@dataclass(frozen=True, slots=True)
class ManifestRegion:
    """A region of guest memory, and its bitmaps by provenance."""

    guest_phys_addr: int
    size: int
    file_offset: int
    """Offset in bytes of the region in the file that backs guest memory."""
    bitmaps: dict[str, BitmapFile]


@dataclass(frozen=True, slots=True)
class ManifestRound:
    """A hinting round (kind ``hint``, bits ``hinted``) or a walk (``walk``, ``walked``).

    Times are pairs of nanoseconds, CLOCK_MONOTONIC of the host and UNIX time, or None.
    """

    round: int
    kind: str
    complete: bool
    void_reason: str | None
    spoilt: str | None
    published: tuple[int, int]
    first_record: tuple[int, int] | None
    last_record: tuple[int, int] | None
    ended: tuple[int, int] | None
    records: int
    pages: int
    bad_records: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest."""

    created: tuple[int, int]
    host_boot_id: str
    """Boot id of the host; monotonic times are comparable only if it is equal."""
    regions: tuple[ManifestRegion, ...]
    rounds: tuple[ManifestRound, ...]
    poison: int | None
    """The value that the guest expects in free pages; None if it negotiated none."""
    pages: dict[str, int]
    """Number of bits set by provenance, summed over the regions."""
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION
    page_size: int = PAGE_SIZE
    safety: str = field(default=SAFETY_RULE)

    def dumps(self) -> str:
        """Return the JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """Read and check a manifest.  Raise :class:`ManifestError`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"not JSON: {error}") from None
        top = _Reader(data, "")
        if top.get("format", str) != FORMAT_NAME:
            raise ManifestError(f"format: not {FORMAT_NAME!r}")
        if top.get("version", int) != FORMAT_VERSION:
            raise ManifestError(f"version: {data['version']} is unknown, {FORMAT_VERSION} is known")
        if top.get("page_size", int) != PAGE_SIZE:
            raise ManifestError(f"page_size: not {PAGE_SIZE}")
        regions = tuple(_region(r) for r in top.items("regions"))
        _check_disjoint(regions)
        return cls(
            created=top.instant("created"),
            host_boot_id=top.get("host_boot_id", str),
            regions=regions,
            rounds=tuple(_round(r) for r in top.items("rounds")),
            poison=top.optional("poison", int),
            pages=_sums(top, regions),
        )


class _Reader:
    """A JSON object and its path, for errors that name the field."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, dict):
            raise ManifestError(f"{path or 'manifest'}: not an object")
        self.data, self.path = data, path

    def get(self, key: str, kind: type[T]) -> T:
        value = self.data.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ManifestError(f"{self.path}{key}: {kind.__name__} expected")
        return value

    def number(self, key: str, limit: int = _ADDRESS_END) -> int:
        value = self.get(key, int)
        if not 0 <= value < limit:
            raise ManifestError(f"{self.path}{key}: {value} is out of range")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self.data.get(key) is None else self.get(key, kind)

    def instant(self, key: str) -> tuple[int, int]:
        value = self.get(key, list)
        if len(value) != 2 or any(type(v) is not int for v in value):
            raise ManifestError(f"{self.path}{key}: two integers expected")
        return (value[0], value[1])

    def maybe_instant(self, key: str) -> tuple[int, int] | None:
        return None if self.data.get(key) is None else self.instant(key)

    def items(self, key: str) -> list[_Reader]:
        found = self.get(key, list)
        return [_Reader(v, f"{self.path}{key}[{i}].") for i, v in enumerate(found)]


def _region(entry: _Reader) -> ManifestRegion:
    size = entry.number("size")
    bitmaps = {
        name: _bitmap(_Reader(data, f"{entry.path}bitmaps.{name}."), size)
        for name, data in entry.get("bitmaps", dict).items()
        if name in PROVENANCES
    }
    start = entry.number("guest_phys_addr")
    if start % PAGE_SIZE or start + size > _ADDRESS_END:
        raise ManifestError(f"{entry.path}guest_phys_addr: {start:#x} is out of range")
    return ManifestRegion(start, size, entry.number("file_offset"), bitmaps)


def _bitmap(entry: _Reader, region_size: int) -> BitmapFile:
    name = entry.get("file", str)
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ManifestError(f"{entry.path}file: {name!r} is not a plain file name")
    pages = region_size // PAGE_SIZE
    if entry.number("bytes") != -(-pages // 64) * 8:
        raise ManifestError(f"{entry.path}bytes: wrong size for {pages} pages")
    digest = entry.get("sha256", str)
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ManifestError(f"{entry.path}sha256: 64 hexadecimal digits expected")
    return BitmapFile(name, entry.number("bytes"), digest, entry.number("pages", pages + 1))


def _round(entry: _Reader) -> ManifestRound:
    kind = entry.get("kind", str)
    if kind not in ("hint", "walk"):
        raise ManifestError(f"{entry.path}kind: {kind!r} is unknown")
    return ManifestRound(
        round=entry.number("round"),
        kind=kind,
        complete=entry.get("complete", bool),
        void_reason=entry.optional("void_reason", str),
        spoilt=entry.optional("spoilt", str),
        published=entry.instant("published"),
        first_record=entry.maybe_instant("first_record"),
        last_record=entry.maybe_instant("last_record"),
        ended=entry.maybe_instant("ended"),
        records=entry.number("records"),
        pages=entry.number("pages"),
        bad_records=entry.number("bad_records"),
    )


def _sums(top: _Reader, regions: tuple[ManifestRegion, ...]) -> dict[str, int]:
    said = _Reader(top.get("pages", dict), "pages.")
    sums = page_sums(regions)
    for name, total in sums.items():
        if said.number(name) != total:
            raise ManifestError(f"pages.{name}: not the sum over the regions")
    return sums


def page_sums(regions: tuple[ManifestRegion, ...]) -> dict[str, int]:
    """Return the number of bits set by provenance, summed over *regions*."""
    sums: dict[str, int] = {}
    for region in regions:
        for name, bitmap in region.bitmaps.items():
            sums[name] = sums.get(name, 0) + bitmap.pages
    return sums


def _check_disjoint(regions: tuple[ManifestRegion, ...]) -> None:
    ordered = sorted(regions, key=lambda r: r.guest_phys_addr)
    for before, after in itertools.pairwise(ordered):
        if before.guest_phys_addr + before.size > after.guest_phys_addr:
            raise ManifestError(f"regions: {after.guest_phys_addr:#x} overlaps the previous region")
