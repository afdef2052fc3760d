# SPDX-License-Identifier: Apache-2.0
"""Wire formats: one declaration, and everything derived from it means the same.

Every format declared in ``virtio_formats`` and ``vballoon_spec`` takes part: bytes are read by the
structure, by plain construct and by the derived NumPy dtype, and all three must agree.
"""

from __future__ import annotations

import importlib
import pkgutil
import struct
from typing import Any

import construct as c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vballoon_spec
import virtio_formats
from virtio_formats.wire import WireError, WireStruct, c_struct, dtype_of, struct_format


def declared() -> dict[str, type[WireStruct]]:
    """Every format of both packages, by its full name."""
    for package in (vballoon_spec, virtio_formats):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: dict[str, type[WireStruct]] = {}
    pending = WireStruct.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.startswith(("vballoon_spec.", "virtio_formats.")):
            found[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return found


FORMATS = declared()
FIXED = sorted(name for name, cls in FORMATS.items() if cls.SIZE >= 0)


def has_dtype(cls: type[WireStruct]) -> bool:
    try:
        cls.dtype()
    except TypeError:
        return False
    return True


VIEWED = [name for name in FIXED if has_dtype(FORMATS[name])]


def test_the_formats_are_found() -> None:
    assert "virtio_formats.virtio.split.VirtqDesc" in VIEWED
    assert "virtio_formats.virtio.packed.PvirtqDesc" in VIEWED
    assert len(FIXED) > 10


def plain(value: Any) -> Any:
    """Return a value in Python's own types, whichever parser read it."""
    if isinstance(value, WireStruct):
        return {name: plain(getattr(value, name)) for name in value._names}
    if isinstance(value, np.void):
        assert value.dtype.names is not None
        return {name: plain(value[name]) for name in value.dtype.names}
    if isinstance(value, c.Container):
        return {k: plain(v) for k, v in value.items() if k != "_io"}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, float | np.floating):
        return struct.pack("<d", value)
    return int(value)


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    cls = FORMATS[name]
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    try:
        value = cls.parse(raw)
    except WireError:
        return  # a field that only has certain values; its own test says which
    assert cls.parse(value.build()) == value
    assert plain(cls.SUBCON.parse(raw)) == plain(value)


@pytest.mark.parametrize("name", VIEWED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_construct_and_numpy_read_the_same(name: str, data: st.DataObject) -> None:
    cls = FORMATS[name]
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    view = np.frombuffer(raw, cls.dtype())[0]
    parsed = plain(cls.SUBCON.parse(raw))
    named = {key: value for key, value in plain(view).items() if key in parsed}
    assert named == parsed
    assert cls.dtype().itemsize == cls.SIZE


@pytest.mark.parametrize("name", FIXED)
def test_truncated_and_trailing_bytes_are_errors(name: str) -> None:
    cls = FORMATS[name]
    for size in {0, cls.SIZE - 1, cls.SIZE + 1, 2 * cls.SIZE} - {cls.SIZE, -1}:
        with pytest.raises(WireError, match=cls.__name__):
            cls.parse(bytes(size))


# the machinery itself


class Flat(WireStruct):
    """Fixed, one byte order."""

    a: int
    b: int
    d: float

    SUBCON = c.Struct("a" / c.Int8ul, "b" / c.Int16sl, "d" / c.Float32l)


class Mixed(WireStruct):
    """Fixed, with padding, an array, bytes, a structure in it, and both byte orders."""

    big: int
    rows: list[int]
    name: bytes
    flat: Any

    SUBCON = c.Struct(
        "big" / c.Int32ub,
        c.Padding(2),
        "rows" / c.Array(3, c.Int16ul),
        "name" / c.Bytes(4),
        "flat" / Flat.SUBCON,
    )


class Counted(WireStruct):
    """As long as its contents say."""

    count: int
    rows: list[int]

    SUBCON = c.Struct("count" / c.Int8ul, "rows" / c.Array(c.this.count, c.Int16ul))


class Tailed(WireStruct):
    """Numbers, and whatever bytes follow: read without construct, by its declaration."""

    size: int
    flags: int
    rest: bytes

    SUBCON = c.Struct("size" / c.Int32ul, "flags" / c.Int16ul, "rest" / c.GreedyBytes)


@given(st.binary(max_size=20))
def test_a_tail_is_what_construct_says(data: bytes) -> None:
    for given_data in (data, bytearray(data), memoryview(data)):
        try:
            expected = Tailed.SUBCON.parse(data)
        except c.ConstructError:
            with pytest.raises(WireError, match=f"Tailed: {len(data)} bytes"):
                Tailed.parse(given_data)
        else:
            value = Tailed.parse(given_data)
            assert value == Tailed(
                size=expected.size, flags=expected.flags, rest=bytes(expected.rest)
            )
            assert isinstance(value.rest, bytes)
            assert value.build() == Tailed.SUBCON.build(expected) == data


def test_numbers_before_a_tail_must_fit() -> None:
    with pytest.raises(WireError, match="Tailed"):
        Tailed(size=1, flags=1 << 16, rest=b"").build()


def test_flat() -> None:
    value = Flat.parse(b"\x01\xfe\xff\x00\x00\x80\x3f")
    assert value == Flat(a=1, b=-2, d=1.0)
    assert value.build() == b"\x01\xfe\xff\x00\x00\x80\x3f"
    assert Flat.SIZE == 7
    assert Flat.dtype() == np.dtype([("a", "u1"), ("b", "<i2"), ("d", "<f4")])
    assert Flat.dtype() is Flat.dtype()


def test_mixed() -> None:
    raw = bytes(range(16)) + Flat(a=1, b=2, d=0.0).build()
    value = Mixed.parse(raw)
    assert value.big == 0x00010203
    assert value.rows == [0x0706, 0x0908, 0x0B0A]
    assert value.name == b"\x0c\x0d\x0e\x0f"
    assert value.flat == {"a": 1, "b": 2, "d": 0.0}
    assert value.build() == raw[:4] + bytes(2) + raw[6:]
    assert Mixed.dtype().itemsize == Mixed.SIZE == len(raw)
    value.flat = Flat(a=1, b=2, d=0.0)  # a structure is accepted in place of its layout
    assert Mixed.parse(value.build()).flat == {"a": 1, "b": 2, "d": 0.0}


def test_a_format_as_long_as_its_contents() -> None:
    assert Counted.SIZE == -1
    assert Counted.parse(b"\x02\x01\x00\x02\x00") == Counted(count=2, rows=[1, 2])
    for wrong in (b"", b"\x02\x01\x00\x02", b"\x01\x01\x00\x00"):
        with pytest.raises(WireError, match="Counted"):
            Counted.parse(wrong)
    with pytest.raises(WireError):
        Counted(count=2, rows=[1]).build()
    with pytest.raises(TypeError):
        Counted.dtype()


@pytest.mark.parametrize("value", [{"a": 256}, {"a": -1}, {"b": 40000}, {"a": "x"}])
def test_values_that_do_not_fit(value: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="Flat"):
        Flat(**{"a": 0, "b": 0, "d": 0.0} | value).build()


def test_values_that_do_not_fit_in_a_nested_structure() -> None:
    good = Mixed.parse(bytes(Mixed.SIZE))
    good.rows = [1, 2]
    with pytest.raises(WireError):
        good.build()
    good.rows = [1, 2, 70000]
    with pytest.raises(WireError):
        good.build()


def test_annotations_and_layout_must_agree() -> None:
    with pytest.raises(TypeError, match="Swapped"):

        class Swapped(WireStruct):
            b: int
            a: int

            SUBCON = c.Struct("a" / c.Int8ul, "b" / c.Int8ul)


def test_what_has_no_dtype_says_so() -> None:
    for con in (c.Int24ul, c.GreedyBytes, c.Array(c.this.n, c.Int8ul), c.VarInt):
        with pytest.raises(TypeError):
            dtype_of(con)


def test_struct_format() -> None:
    assert struct_format(Flat.SUBCON) == "<Bhf"
    assert struct_format(Mixed.SUBCON) is None
    assert struct_format(c.Struct("a" / c.Int16ul, "b" / c.Int16ub)) is None
    assert struct_format(c.Struct("a" / c.Int8ub, "b" / c.Int16ul)) == "<BH"


def test_c_struct() -> None:
    class Record(WireStruct):
        addr: int
        kind: int
        name: bytes
        rows: list[int]

        SUBCON = c.Struct(
            "addr" / c.Int64ul,
            "kind" / c.Int8ul,
            "name" / c.Bytes(3),
            "rows" / c.Array(2, c.Int32ul),
        )

    assert c_struct(Record, "record") == (
        "struct record {\n\t__le64 addr;\n\t__u8 kind;\n\t__u8 name[3];\n\t__le32 rows[2];\n"
        "} __packed;\n"
    )
    with pytest.raises(TypeError):
        c_struct(Mixed, "mixed")
