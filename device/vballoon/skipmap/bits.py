# SPDX-License-Identifier: Apache-2.0
"""Set, clear and count bits for whole batches of ranges.

A bitmap is an array of little-endian 64-bit words; bit *b* of word *w* is page ``64 w + b``
(the layout of Linux' ``KVM_GET_DIRTY_LOG``).  A range is half open, in bits.

Free blocks of the buddy allocator are naturally aligned powers of two, so nearly all ranges that a
guest sends are runs of whole words.  One fancy-indexed store writes such a run to a *window* view,
whose items are 2**k words wide and start at every word; two overlapping windows cover a run of any
length.  Only the partial words of unaligned ranges need a read-modify-write, and a second one if
several entries change the same word.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.pages import coalesce
from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("WORD_BITS", "count", "extents", "fill")

if sys.byteorder != "little":  # pragma: no cover - no supported host is big-endian
    raise ImportError(
        "the skip bitmap's words are little-endian; big-endian hosts are not supported"
    )

WORD_BITS = 64
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_SIX, _LOW = np.uint64(6), np.uint64(63)

LONG_RUN = 512
"""Number of words (32768 pages, 128 MiB of guest) from which a run is filled by its own slice: the
0.2 µs of the interpreter are then small compared with writing 4 KiB."""
COUNT_CHUNK = 1 << 15
"""Number of words counted at a time, so that the intermediate counts stay in the cache."""
SCAN_CHUNK = 1 << 15
"""Number of words scanned for extents at a time.  It bounds the temporaries (16 MiB if every bit is
an edge) and keeps those of a typical bitmap in the cache."""


def fill(
    words: NDArray[np.uint64], start: NDArray[np.uint64], end: NDArray[np.uint64], value: bool
) -> None:
    """Set (or clear, when *value* is False) the bits of all ranges ``start <= bit < end``.

    *start* and *end* are uint64[n], in bits, inside *words*, none empty; they may overlap, repeat
    and come in any order.
    """
    if not start.size:
        return
    size = end - start
    if float(size.sum(dtype=np.float64)) > words.size * WORD_BITS:
        start, end = coalesce(start, end)  # bounds the work by the size of the map
    ragged = int(np.bitwise_or.reduce(start | end)) & 63
    if not ragged:
        _fill_words(words, start >> _SIX, end >> _SIX, value)
        return
    first = (start + _LOW) >> _SIX
    last = end >> _SIX
    whole = last > first
    if whole.all():
        _fill_words(words, first, last, value)
    elif whole.any():
        _fill_words(words, first[whole], last[whole], value)
    _fill_ends(words, start, end, value)


def _fill_words(
    words: NDArray[np.uint64], first: NDArray[np.uint64], last: NDArray[np.uint64], value: bool
) -> None:
    """Fill runs of whole words, ``first <= word < last``."""
    run = last - first
    low, high = int(run.min()).bit_length() - 1, int(run.max()).bit_length() - 1
    if low == high and 1 << low < LONG_RUN:
        _fill_windows(words, low, first, last, run, value)
        return
    for k in range(low, min(high + 1, LONG_RUN.bit_length() - 1)):
        chosen = np.flatnonzero(run >> np.uint64(k) == 1)
        if chosen.size:
            _fill_windows(words, k, first[chosen], last[chosen], run[chosen], value)
    if 1 << high >= LONG_RUN:
        for i in np.flatnonzero(run >= LONG_RUN).tolist():
            words[int(first[i]) : int(last[i])] = _ONES if value else 0


def _fill_windows(
    words: NDArray[np.uint64],
    k: int,
    first: NDArray[np.uint64],
    last: NDArray[np.uint64],
    run: NDArray[np.uint64],
    value: bool,
) -> None:
    """Fill runs of 2**k to 2**(k+1) - 1 words: one window at the front, one at the back."""
    width = 1 << k
    window = np.ndarray(
        shape=(words.size - width + 1,), dtype=f"V{8 * width}", buffer=words.data, strides=(8,)
    )
    item = np.full(width, _ONES if value else 0, dtype=np.uint64).view(window.dtype)[0]
    window[first.view(np.intp)] = item
    if int(np.bitwise_or.reduce(run)) != width:
        window[(last - np.uint64(width)).view(np.intp)] = item


def _fill_ends(
    words: NDArray[np.uint64], start: NDArray[np.uint64], end: NDArray[np.uint64], value: bool
) -> None:
    """Fill the bits of ranges in words that they cover only partly."""
    head_word, tail_word = start >> _SIX, (end - np.uint64(1)) >> _SIX
    head = _ONES << (start & _LOW)
    tail = _ONES >> (_LOW - ((end - np.uint64(1)) & _LOW))
    short = head_word == tail_word
    if short.all():
        _apply(words, head_word, head & tail, value)
        return
    _apply(words, head_word[short], (head & tail)[short], value)
    ragged_head = ~short & (head != _ONES)
    _apply(words, head_word[ragged_head], head[ragged_head], value)
    ragged_tail = ~short & (tail != _ONES)
    _apply(words, tail_word[ragged_tail], tail[ragged_tail], value)


def _apply(
    words: NDArray[np.uint64], word: NDArray[np.uint64], mask: NDArray[np.uint64], value: bool
) -> None:
    """OR *mask* into (or clear it from) the words named, which may repeat.

    If several entries name one word, only the last store takes effect.  Entries whose bits are
    missing afterwards are then combined word by word; a typical batch needs one pass.
    """
    index = word.view(np.intp)
    _read_modify_write(words, index, mask, value)
    found = words[index] & mask
    missed = found != (mask if value else 0)
    if missed.any():
        index, mask = index[missed], mask[missed]
        order = np.argsort(index)
        index = index[order]
        first = np.flatnonzero(np.diff(index, prepend=-1))
        _read_modify_write(words, index[first], np.bitwise_or.reduceat(mask[order], first), value)


def _read_modify_write(
    words: NDArray[np.uint64], index: NDArray[np.intp], mask: NDArray[np.uint64], value: bool
) -> None:
    if value:
        words[index] |= mask
    else:
        words[index] &= ~mask


def count(words: NDArray[np.uint64]) -> int:
    """Return the number of bits set."""
    if native is not None:
        return native.count(np.ascontiguousarray(words))
    whole = words.size - words.size % COUNT_CHUNK
    total = 0
    ones = np.empty(COUNT_CHUNK, dtype=np.uint8)
    lanes = ones.reshape(64, -1)
    for at in range(0, whole, COUNT_CHUNK):
        np.bitwise_count(words[at : at + COUNT_CHUNK], out=ones)
        # the sum of 64 words of at most 64 bits fits a 16-bit lane, and adding lanes is vectorised
        total += int(np.add.reduce(lanes, axis=0, dtype=np.uint16).sum())
    return total + int(np.bitwise_count(words[whole:]).sum())


def extents(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the runs of set bits, shape (k, 2), half open, in bits, ascending.

    This uses 16 bytes for each run, and temporaries bounded by :data:`SCAN_CHUNK`.
    """
    edges: list[NDArray[np.uint64]] = []
    carry = np.uint64(0)
    for at in range(0, words.size, SCAN_CHUNK):
        piece = words[at : at + SCAN_CHUNK]
        before = np.empty_like(piece)
        before[0] = carry
        before[1:] = piece[:-1] >> _LOW
        carry = piece[-1] >> _LOW
        changes = piece ^ ((piece << np.uint64(1)) | before)
        edges.append(_bit_numbers(changes, at))
    if carry:
        edges.append(np.array([words.size * WORD_BITS], dtype=np.uint64))
    flat = np.concatenate(edges) if edges else np.empty(0, dtype=np.uint64)
    return flat.reshape(-1, 2)


def _bit_numbers(words: NDArray[np.uint64], first_word: int) -> NDArray[np.uint64]:
    """Return the numbers of all set bits, ascending; word 0 of *words* is *first_word*."""
    busy = np.flatnonzero(words)
    bits = np.unpackbits(words[busy].view(np.uint8), bitorder="little")
    position = np.flatnonzero(bits)
    number: NDArray[np.int64] = ((busy[position >> 6] + first_word) << 6) | (position & 63)
    return number.view(np.uint64)
