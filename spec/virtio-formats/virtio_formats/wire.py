# SPDX-License-Identifier: Apache-2.0
"""The declaration of wire formats, and everything that is derived from a declaration.

A format is a class with a construct layout::

    class VirtqDesc(WireStruct):
        addr: int
        len: int
        flags: int
        next: int

        SUBCON = c.Struct(
            "addr" / c.Int64ul, "len" / c.Int32ul, "flags" / c.Int16ul, "next" / c.Int16ul
        )

The declaration yields the parser and the builder (:meth:`WireStruct.parse`,
:meth:`WireStruct.build`), the NumPy dtype for the same bytes (:meth:`WireStruct.dtype`), and the C
declaration of the guest module (:func:`c_struct`).  A layout is written only once.

Enumerations and flags are plain integers on the wire.  An unknown value survives a round trip
unchanged, and the code that handles the field decides what it means.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

from virtio_formats.declare import Declaration

if TYPE_CHECKING:
    import construct as c
    import numpy as np

__all__ = ("WireError", "WireStruct", "c_struct", "dtype_of", "struct_format")

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """Report bytes that do not match the format: too short, too long, or a field out of range."""


def dtype_of(con: c.Construct) -> np.dtype[Any]:
    """Return the NumPy dtype that reads the same bytes as the fixed-size construct *con*.

    Raise :class:`TypeError` for a layout whose size or meaning depends on its contents.
    """
    import construct as c
    import numpy as np

    while isinstance(con, c.Renamed):
        con = con.subcon
    if isinstance(con, c.FormatField):
        order, letter = con.fmtstr[0], con.fmtstr[1]
        kind = "f" if letter in "efd" else "u" if letter.isupper() else "i"
        return np.dtype(f"{order}{kind}{con.length}")
    if isinstance(con, c.Struct):
        fields = [(sub.name or f"_pad{i}", dtype_of(sub)) for i, sub in enumerate(con.subcons)]
        return np.dtype(fields)
    if isinstance(con, c.Array) and isinstance(con.count, int):
        return np.dtype((dtype_of(con.subcon), (con.count,)))
    if isinstance(con, c.BytesInteger) and isinstance(con.length, int):
        raise TypeError("an integer of this width has no NumPy type")
    if isinstance(con, c.Bytes | c.Padded) and isinstance(con.length, int):
        return np.dtype((np.uint8, (con.length,)))
    raise TypeError(f"no fixed NumPy type for {con!r}")


def struct_format(con: c.Struct) -> str | None:
    """Return the :mod:`struct` format of a flat layout, or None if it has no single one."""
    import construct as c

    formats: list[str] = []
    for sub in con.subcons:
        while isinstance(sub, c.Renamed):
            sub = sub.subcon
        if not isinstance(sub, c.FormatField):
            return None
        formats.append(sub.fmtstr)
    orders = {f[0] for f in formats if f[1:] not in ("B", "b")}
    if len(orders) > 1:
        return None
    return (orders.pop() if orders else "<") + "".join(f[1:] for f in formats)


def _has_tail(con: c.Struct) -> bool:
    """Return whether the last field takes all remaining bytes."""
    import construct as c

    last = con.subcons[-1] if con.subcons else None
    while isinstance(last, c.Renamed):
        last = last.subcon
    return last is c.GreedyBytes


@dataclass_transform(kw_only_default=True)
class WireStruct:
    """A wire format: typed fields, and their layout as ``SUBCON``.

    Subclasses become keyword-only dataclasses.  A field whose value is another
    :class:`WireStruct` is declared in the layout by that class's own ``SUBCON``.
    """

    SUBCON: ClassVar[c.Struct]
    SIZE: ClassVar[int]
    """Size in bytes of a fixed-size format; -1 if the size depends on the contents."""
    _flat: ClassVar[struct.Struct | None]
    _tailed: ClassVar[bool]
    """Whether :attr:`_flat` is all but the last field, which takes all remaining bytes."""
    _names: ClassVar[tuple[str, ...]]
    _dtype: ClassVar[np.dtype[Any]]

    def __init_subclass__(cls) -> None:
        """Check that annotations and layout name the same fields in the same order."""
        dataclasses.dataclass(kw_only=True)(cls)
        cls._names = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        layout = cls.__dict__.get("SUBCON")
        if isinstance(layout, Declaration):
            names, fmt = cls._declared(layout)
        else:
            names, fmt = cls._constructed()
        if names != cls._names:
            raise TypeError(f"{cls.__name__}: fields {cls._names} but layout {names}")
        cls._flat = struct.Struct(fmt) if fmt else None

    @classmethod
    def _declared(cls, layout: Declaration) -> tuple[tuple[str, ...], str | None]:
        """Set size and tail from a declaration; return field names and struct format."""
        fields = layout.fields
        cls.SIZE = layout.size
        cls._tailed = bool(fields) and fields[-1].takes_rest
        flat = fields[:-1] if cls._tailed else fields
        unnamed = any(field.name is None for field in fields)
        names = tuple(field.name for field in fields if field.name is not None)
        return names, None if unnamed else layout.flat(flat)

    @classmethod
    def _constructed(cls) -> tuple[tuple[str, ...], str | None]:
        """Set size and tail from a construct; return field names and struct format."""
        import construct as c

        subcons = cls.SUBCON.subcons
        names = tuple(sub.name for sub in subcons if sub.name)
        try:
            cls.SIZE = cls.SUBCON.sizeof()
        except c.SizeofError:
            cls.SIZE = -1
        cls._tailed = _has_tail(cls.SUBCON)
        flat = c.Struct(*subcons[:-1]) if cls._tailed else cls.SUBCON
        return names, struct_format(flat) if len(names) == len(subcons) else None

    @classmethod
    def declared_fields(cls) -> tuple[Declaration, ...]:
        """Return the fields of a layout that was declared with :mod:`virtio_formats.declare`."""
        layout = cls.__dict__["SUBCON"]
        return layout.fields if isinstance(layout, Declaration) else ()

    @classmethod
    def flat_struct(cls) -> struct.Struct:
        """Return the compiled :mod:`struct` format of a flat layout, for the hot path.

        Raise :class:`TypeError` for a layout that has none.
        """
        if cls._flat is None or cls._tailed:
            raise TypeError(f"{cls.__name__} has no struct format")
        return cls._flat

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Return the one structure in *data*.  Raise :class:`WireError` for any other length."""
        if cls.SIZE >= 0 and len(data) != cls.SIZE:
            raise WireError(f"{cls.__name__}: {len(data)} bytes instead of {cls.SIZE}")
        if cls._flat is not None:
            return cls(**dict(zip(cls._names, cls._unpack(data, cls._flat), strict=True)))
        import construct as c

        try:
            found = _terminated(cls.SUBCON).parse(bytes(data))
        except c.ConstructError as error:
            raise WireError(f"{cls.__name__}: {_first_line(error)}") from None
        return cls._from_container(found)

    @classmethod
    def _unpack(cls, data: Buffer, flat: struct.Struct) -> tuple[Any, ...]:
        if not cls._tailed:
            return flat.unpack(data)
        if len(data) < flat.size:
            raise WireError(f"{cls.__name__}: {len(data)} bytes instead of {flat.size}")
        return (*flat.unpack_from(data), bytes(data[flat.size :]))

    @classmethod
    def _from_container(cls, found: Any) -> Self:
        values = {name: _plain(found[name]) for name in cls._names}
        return cls(**values)

    def build(self) -> bytes:
        """Return the bytes.  Raise :class:`WireError` for a value that does not fit."""
        if self._flat is not None:
            values = [getattr(self, name) for name in self._names]
            tail = values.pop() if self._tailed else b""
            try:
                return self._flat.pack(*values) + tail
            except struct.error as error:
                raise WireError(f"{type(self).__name__}: {_first_line(error)}") from None
        import construct as c

        fields = {name: _wire(getattr(self, name)) for name in self._names}
        try:
            return bytes(self.SUBCON.build(fields))
        except (c.ConstructError, struct.error) as error:
            raise WireError(f"{type(self).__name__}: {_first_line(error)}") from None

    @classmethod
    def dtype(cls) -> np.dtype[Any]:
        """Return the NumPy dtype that views the same bytes (derived and cached)."""
        if "_dtype" not in cls.__dict__:
            cls._dtype = dtype_of(cls.SUBCON)
        return cls._dtype


@functools.cache
def _terminated(con: c.Struct) -> c.Construct:
    import construct as c

    return c.FocusedSeq("body", "body" / con, c.Terminated)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _plain(value: Any) -> Any:
    """Return construct's containers as plain dicts and lists, without its own entries."""
    import construct as c

    if isinstance(value, c.ListContainer):
        return [_plain(item) for item in value]
    if isinstance(value, c.Container):
        return {k: _plain(v) for k, v in value.items() if k != "_io"}
    return value


def _wire(value: Any) -> Any:
    if isinstance(value, WireStruct):
        return {name: _wire(getattr(value, name)) for name in value._names}
    if isinstance(value, list | tuple):
        return [_wire(item) for item in value]
    return value


_C_TYPES = {
    "<B": "__u8",
    "<H": "__le16",
    "<L": "__le32",
    "<I": "__le32",
    "<Q": "__le64",
    ">B": "__u8",
    "=B": "__u8",
}


def c_struct(cls: type[WireStruct], name: str) -> str:
    """Return the C declaration (``struct name { … } __packed;``) of the little-endian layout."""
    import construct as c

    lines = []
    for sub in cls.SUBCON.subcons:
        inner, suffix = sub, ""
        while isinstance(inner, c.Renamed):
            inner = inner.subcon
        if isinstance(inner, c.Array):
            suffix, inner = f"[{inner.count}]", inner.subcon
        elif isinstance(inner, c.Bytes):
            suffix, inner = f"[{inner.length}]", c.Int8ul
        if not isinstance(inner, c.FormatField) or inner.fmtstr not in _C_TYPES:
            raise TypeError(f"{cls.__name__}.{sub.name}: no C type")
        lines.append(f"\t{_C_TYPES[inner.fmtstr]} {sub.name}{suffix};")
    return f"struct {name} {{\n" + "\n".join(lines) + "\n} __packed;\n"
