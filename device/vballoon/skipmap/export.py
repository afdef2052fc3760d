# SPDX-License-Identifier: Apache-2.0
"""Write and read skip-bitmap exports.

The format is in ``vballoon_spec/skipmap/README.md``.  A directory is created complete or not at
all.  The reader checks everything that the format allows to check, and returns no bits that the
safety rule forbids unless the caller accepts them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import UsageError
from vballoon.memory import PAGE_SIZE
from vballoon.skipmap import bits
from vballoon.skipmap.bitmap import PageBitmap, combine
from vballoon.skipmap.layout import BitmapLayout
from vballoon.skipmap.rounds import Instant, Provenance, RoundKind
from vballoon_spec.skipmap import (
    MANIFEST_FILE,
    BitmapFile,
    Manifest,
    ManifestError,
    ManifestRegion,
    ManifestRound,
    page_sums,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import IO

    from numpy.typing import NDArray

    from vballoon.skipmap.map import SkipMap
    from vballoon.skipmap.rounds import Round

__all__ = ("FrozenExport", "SkipExport", "read_bitmap", "receive_export", "write_export")

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
WRITE_WORDS = 1 << 17
"""Number of words written and hashed at a time (1 MiB); all-zero pieces become holes."""
MANIFEST_MAX = 64 << 20
"""Maximum bytes of a manifest: enough for 100,000 regions, and a bound for the memory used."""


class FrozenExport:
    """A copy of the bits and rounds of *skipmap* at this moment, to be written later.

    It uses memory for the parts of the bitmaps that are in use.  :meth:`write` may run in another
    thread while the device continues.
    """

    def __init__(self, skipmap: SkipMap) -> None:
        now = Instant.now()
        self._created = (now.monotonic_ns, now.wall_ns)
        self._layout = skipmap.layout
        self._poison = skipmap.poison
        self._rounds = tuple(_round_entry(r) for r in skipmap.rounds.values())
        self._bitmaps = {p: skipmap.valid_now(p) for p in Provenance}

    def write(self, directory: str | os.PathLike[str]) -> Manifest:
        """Write a new *directory*, complete or not at all.

        Raise :class:`~vballoon.errors.UsageError` if the directory exists and is not empty, or
        cannot be written; no files remain then.
        """
        return _new_directory(directory, self._write_files)

    def _write_files(self, directory: Path) -> Manifest:
        def write(name: str, bitmap: PageBitmap, index: int) -> BitmapFile:
            with (directory / name).open("wb") as file:
                entry = _write_bitmap(file, 0, name, bitmap, index)
                file.flush()
                os.fsync(file.fileno())
            return entry

        manifest = self._manifest(write)
        with (directory / MANIFEST_FILE).open("w") as file:
            file.write(manifest.dumps())
            file.flush()
            os.fsync(file.fileno())
        return manifest

    def to_descriptor(self) -> tuple[int, int, Manifest]:
        """Write the export into a sealed memory file.

        Return its descriptor (the caller closes it), the manifest's offset, and the manifest.
        The bitmaps come first, in the manifest's order, each from a multiple of 4096 bytes on; the
        manifest is the rest of the file. :func:`receive_export` reads it.
        """
        fd = os.memfd_create("vballoon-export", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        end = 0
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:

                def write(name: str, bitmap: PageBitmap, index: int) -> BitmapFile:
                    nonlocal end
                    entry = _write_bitmap(file, end, name, bitmap, index)
                    end += entry.bytes + -entry.bytes % PAGE_SIZE
                    return entry

                manifest = self._manifest(write)
                file.seek(end)
                file.write(manifest.dumps().encode())
            os.fchmod(fd, 0o400)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd, end, manifest

    def _manifest(self, write: Callable[[str, PageBitmap, int], BitmapFile]) -> Manifest:
        """Return the manifest of the bitmaps, each of which *write* has written."""
        regions = tuple(
            ManifestRegion(
                region.guest_phys_addr,
                region.size,
                region.file_offset,
                {
                    p.value: write(f"{p}-{i}.bitmap", bitmap, i)
                    for p, bitmap in self._bitmaps.items()
                },
            )
            for i, region in enumerate(self._layout.regions)
        )
        return Manifest(
            created=self._created,
            host_boot_id=_boot_id(),
            regions=regions,
            rounds=self._rounds,
            poison=self._poison,
            pages=page_sums(regions),
        )


def write_export(skipmap: SkipMap, directory: str | os.PathLike[str]) -> Manifest:
    """Write all current bitmaps of *skipmap*.  Raise errors like :meth:`FrozenExport.write`."""
    return FrozenExport(skipmap).write(directory)


def receive_export(fd: int, manifest_at: int, directory: str | os.PathLike[str]) -> Manifest:
    """Write the export in the memory file *fd* to a new *directory*, complete or not at all.

    *fd* and *manifest_at* come from :meth:`FrozenExport.to_descriptor`, through the control socket.
    Raise :class:`~vballoon.errors.UsageError` where the file is not such an export or the directory
    cannot be written.
    """
    size = os.fstat(fd).st_size
    if not 0 <= size - manifest_at <= MANIFEST_MAX:
        raise UsageError("the export that was received has no manifest")
    text = os.pread(fd, size - manifest_at, manifest_at)
    try:
        manifest = Manifest.loads(text)
    except (ManifestError, UnicodeDecodeError) as error:
        raise UsageError(f"the export that was received: {error}") from None

    def write(draft: Path) -> Manifest:
        at = 0
        for region in manifest.regions:
            for entry in region.bitmaps.values():
                _copy_range(fd, at, entry.bytes, draft / entry.file)
                at += entry.bytes + -entry.bytes % PAGE_SIZE
        (draft / MANIFEST_FILE).write_bytes(text)
        return manifest

    return _new_directory(directory, write)


def _copy_range(fd: int, at: int, size: int, path: Path) -> None:
    """Copy *size* bytes from offset *at* of *fd* to a new file, with its holes."""
    end = at + size
    with path.open("xb") as file:
        file.truncate(size)
        low = at
        while low < end:
            try:
                low = os.lseek(fd, low, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            if low >= end:
                break
            high = min(os.lseek(fd, low, os.SEEK_HOLE), end)
            file.seek(low - at)
            while low < high:
                piece = os.pread(fd, min(high - low, 8 * WRITE_WORDS), low)
                if not piece:
                    raise UsageError("the export that was received is too short")
                file.write(piece)
                low += len(piece)
        file.flush()
        os.fsync(file.fileno())


def _new_directory(
    directory: str | os.PathLike[str], write: Callable[[Path], Manifest]
) -> Manifest:
    """Have *write* fill a new *directory*, which appears complete or not at all."""
    target = Path(os.path.abspath(directory))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            manifest = write(draft)
            draft.rename(target)  # onto an empty directory at most
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot export to {target}: {error.strerror or error}") from None
    return manifest


def _write_bitmap(
    file: IO[bytes], base: int, name: str, bitmap: PageBitmap, index: int
) -> BitmapFile:
    """Write region *index* at offset *base*; parts without bits are neither read nor written."""
    region = bitmap.layout.regions[index]
    words = bitmap.region(index)
    spans = [(a - region.first_word, b - region.first_word) for a, b in bitmap.spans()]
    digest, pages = hashlib.sha256(), 0
    zeroes = bytes(8 * WRITE_WORDS)
    for at in range(0, words.size, WRITE_WORDS):
        end = min(at + WRITE_WORDS, words.size)
        if any(a < end and b > at for a, b in spans):
            piece = words[at:end]
            pages += bits.count(piece)
            digest.update(piece.data)
            file.seek(base + 8 * at)
            file.write(piece.data)
        else:
            digest.update(memoryview(zeroes)[: 8 * (end - at)])
    file.truncate(base + 8 * words.size)
    return BitmapFile(name, 8 * words.size, digest.hexdigest(), pages)


def _round_entry(round_: Round) -> ManifestRound:
    def pair(at: Instant | None) -> tuple[int, int] | None:
        return None if at is None else (at.monotonic_ns, at.wall_ns)

    return ManifestRound(
        round=round_.id,
        kind=round_.kind.value,
        complete=round_.complete and round_.void_reason is None,
        void_reason=round_.void_reason,
        spoilt=round_.spoilt,
        published=(round_.published.monotonic_ns, round_.published.wall_ns),
        first_record=pair(round_.first_record),
        last_record=pair(round_.last_record),
        ended=pair(round_.ended),
        records=round_.records,
        pages=round_.pages,
        bad_records=round_.bad_records,
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class SkipExport:
    """An export directory, read and checked.

    *accept_incomplete* allows the bits of a round that did not end complete, *accept_void* those
    of a void one; by default both raise :class:`~vballoon.errors.UsageError`, as does a
    hinted or walked bitmap that belongs to no round.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        accept_incomplete: bool = False,
        accept_void: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.layout = BitmapLayout(self.manifest.regions)
        self._accept_incomplete = accept_incomplete
        self._accept_void = accept_void

    @property
    def provenances(self) -> tuple[Provenance, ...]:
        """The provenances that have a bitmap for every region."""
        regions = self.manifest.regions
        return tuple(
            p for p in Provenance if regions and all(p.value in r.bitmaps for r in regions)
        )

    def round_of(self, provenance: Provenance) -> ManifestRound | None:
        """Return the round of *provenance*'s bits, or None."""
        for round_ in self.manifest.rounds:
            if RoundKind(round_.kind).provenance is provenance:
                return round_
        return None

    def objection(self, provenance: Provenance) -> str | None:
        """Return why the bits of *provenance* must not be used, or None."""
        if provenance not in (Provenance.HINTED, Provenance.WALKED):
            return None
        round_ = self.round_of(provenance)
        if round_ is None:
            return None if self._accept_void else f"{provenance} bits belong to no round"
        if round_.void_reason is not None and not self._accept_void:
            return f"{round_.kind} round {round_.round} is void: {round_.void_reason}"
        if not round_.complete and round_.void_reason is None and not self._accept_incomplete:
            return f"{round_.kind} round {round_.round} is incomplete ({round_.spoilt or 'no end'})"
        return None

    def bitmap(self, provenance: Provenance) -> PageBitmap:
        """Return the checked bits of *provenance*.  Raise :class:`~vballoon.errors.UsageError`."""
        reason = self.objection(provenance)
        if reason is not None:
            raise UsageError(f"{self.directory}: {reason}")
        return self.raw_bitmap(provenance)

    def raw_bitmap(self, provenance: Provenance) -> PageBitmap:
        """Return the bits without the check of the round: for display, not for skipping."""
        try:
            result = PageBitmap(self.layout)
        except MemoryError:
            raise UsageError(f"{self.directory}: a bitmap larger than this machine") from None
        by_address = {r.guest_phys_addr: r for r in self.manifest.regions}
        for index, placed in enumerate(self.layout.regions):
            entry = by_address[placed.guest_phys_addr].bitmaps.get(provenance.value)
            if entry is None:
                raise UsageError(f"{self.directory}: no {provenance} bitmap for region {index}")
            words = read_bitmap(self.directory / entry.file, placed.pages, entry)
            result.region(index)[:] = words
        return result

    def skippable(self, written: PageBitmap | None, *, fills_poison: bool = False) -> PageBitmap:
        """Return the pages that a copy may leave out by the safety rule.

        *written*: every page written since before the rounds were published, from the caller's own
        tracking; if it is None, no hinted or walked bit is used.
        *fills_poison*: the restore fills left-out pages with the manifest's poison value.
        """
        poisoned = bool(self.manifest.poison) and not fills_poison
        used = [self.bitmap(Provenance.BALLOONED), self.bitmap(Provenance.REPORTED)]
        if written is not None and not poisoned:
            for provenance in (Provenance.HINTED, Provenance.WALKED):
                if self.round_of(provenance) is not None:
                    used.append(self.bitmap(provenance))
        result = combine(used)
        return result if written is None else result.and_not(written)

    def verify(self) -> dict[Provenance, int]:
        """Check every file of the export and return pages by provenance.  Raise UsageError."""
        return {p: self.raw_bitmap(p).count() for p in self._named()}

    def _named(self) -> Iterable[Provenance]:
        regions = self.manifest.regions
        return [p for p in Provenance if any(p.value in r.bitmaps for r in regions)]


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MANIFEST_MAX + 1)
        if len(text) > MANIFEST_MAX:
            raise ManifestError("too large")
        return Manifest.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ManifestError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


def read_bitmap(path: Path, pages: int, entry: BitmapFile | None = None) -> NDArray[np.uint64]:
    """Return the words of a raw bitmap file of *pages* pages, checked against *entry* if given."""
    size = -(-pages // bits.WORD_BITS) * 8
    try:
        if path.stat().st_size != size:
            raise UsageError(f"{path}: {path.stat().st_size} bytes where {size} are due")
        words = np.fromfile(path, dtype="<u8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise UsageError(f"{path}: larger than this machine") from None
    if words.size * 8 != size:
        raise UsageError(f"{path}: changed while it was read")
    if entry is not None and hashlib.sha256(words.data).hexdigest() != entry.sha256:
        raise UsageError(f"{path}: checksum does not match the manifest")
    if pages % bits.WORD_BITS and words[-1] >> np.uint64(pages % bits.WORD_BITS):
        raise UsageError(f"{path}: bits are set after the last page")
    if entry is not None and bits.count(words) != entry.pages:
        raise UsageError(f"{path}: not the {entry.pages} pages that the manifest names")
    return words
