r"""Encodings of live records: fixed-width blocks with checksums, and the JSON lines of older studies.

    file    header, block, block, ...
    header  "STABLIVE", u4 bytes of the text, u4 crc32 of all other bytes of the header, the text: JSON with the format,
            the record's name, and the columns with kind, entries of a list, and the texts that codes stand for
    block   "BLK\xff", u4 rows, u4 crc32 of the rows, u4 crc32 of the 12 bytes before it, the rows
    row     u4 mask (bit i: column i is null), then the columns without padding: i8, f8, f8 for each entry of a list,
            u1 for a text (its code)

Everything is little-endian. A null cell holds zeros, so that equal rows are equal bytes.

JSON lines, one object per line, are read and cut but no longer written. In them bare NaN and Infinity are numbers, null
means "not applicable", and a kill leaves at most one torn last line.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from stabstudy import disk
from stabstudy.trace import Column, DamagedRecord, Rows, Schema, check_steps, from_dicts

FORMAT = 1
MAGIC, MARKER = b"STABLIVE", b"BLK\xff"
PREFIX = struct.Struct("<8sII")
BLOCK = struct.Struct("<4sIII")
MASK = "null"
MOST_COLUMNS = 32
KEPT = 64
"""Layouts that are not made anew for every file: the members of a pack have one in common."""

Table = NDArray[Any]
"""A structured array of rows."""


@dataclass(frozen=True)
class Field:
    """A column of a file: `entries` of a list (1 for other kinds), `codes` of a text."""

    name: str
    kind: str
    entries: int
    codes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The content of a file's header."""

    record: str
    fields: tuple[Field, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        types = {"int": "<i8", "float": "<f8", "text": "u1"}
        columns = [
            (f.name, "<f8", (f.entries,)) if f.kind == "floats" else (f.name, types[f.kind]) for f in self.fields
        ]
        return np.dtype([(MASK, "<u4"), *columns])

    @cached_property
    def header(self) -> bytes:
        """The bytes that a file of this layout begins with."""
        body = {"format": FORMAT, "record": self.record, "columns": [asdict(f) for f in self.fields]}
        text = json.dumps(body, separators=(",", ":")).encode()
        return PREFIX.pack(MAGIC, len(text), _header_crc(len(text), text)) + text


def layout(schema: Schema, widths: Mapping[str, int]) -> Layout:
    """The layout of a schema's rows with lists of `widths` entries. Raises ValueError for a list without a width."""
    if missing := [c.name for c in schema.columns if c.kind == "floats" and c.name not in widths]:
        raise ValueError(f"{schema.name}: no number of entries for {', '.join(missing)}")
    if len(schema.columns) > MOST_COLUMNS:
        raise ValueError(f"{schema.name}: {len(schema.columns)} columns, a mask of nulls has {MOST_COLUMNS} bits")
    return _layout(schema, tuple(widths[c.name] if c.kind == "floats" else 1 for c in schema.columns))


@lru_cache(maxsize=KEPT)
def _layout(schema: Schema, entries: tuple[int, ...]) -> Layout:
    fields = (Field(c.name, c.kind, n, c.codes) for c, n in zip(schema.columns, entries, strict=True))
    return Layout(schema.name, tuple(fields))


def record_type(schema: Schema, widths: Mapping[str, int]) -> np.dtype[Any]:
    """The type of one row: `null` (u4 mask), then the schema's columns. Raises ValueError, see `layout`."""
    return layout(schema, widths).dtype


def records(
    schema: Schema,
    widths: Mapping[str, int],
    columns: Mapping[str, Any],
    nulls: Mapping[str, Any],
) -> Table:
    """Rows of any leading shape, filled a column at a time.

    `columns`: arrays of the leading shape (lists: one axis more; texts: u1 codes) or what broadcasts to it. `nulls`:
    where a column is null, likewise. A column left out is null everywhere. Raises ValueError for a null where none is
    legal, an unknown column, or shapes that do not fit.
    """
    if unknown := {*columns, *nulls} - set(schema.names):
        raise ValueError(f"{schema.name}: no column {', '.join(sorted(unknown))}")
    kinds = {c.name: c.kind for c in schema.columns}
    shapes = [np.shape(v)[: -1 if kinds[n] == "floats" else None] for n, v in columns.items()]
    table = np.zeros(np.broadcast_shapes(*shapes, *map(np.shape, nulls.values())), record_type(schema, widths))
    for bit, column in enumerate(schema.columns):
        null = np.asarray(nulls.get(column.name, column.name not in columns), dtype=bool)
        if not column.nullable and null.any():
            raise ValueError(f"{schema.name}: {column.name} must not be null")
        if column.name in columns:
            table[column.name] = columns[column.name]
        if null.any():
            _clear(table, column, bit, null)
    return table


def from_rows(rows: Rows, widths: Mapping[str, int]) -> Table:
    """Shape [n]: rows in memory as records. Raises DamagedRecord for other lengths of lists, a text without a code."""
    columns: dict[str, Any] = {}
    for column in rows.schema.columns:
        values, null = rows[column.name], rows.is_null(column.name)
        if column.kind == "text":
            values = _codes(values, null, column)
        elif column.kind == "floats" and values.shape[1] != widths[column.name]:
            if not null.all():
                raise DamagedRecord(
                    f"{column.name}: {values.shape[1]} entries where {widths[column.name]} are expected"
                )
            values = np.zeros((len(rows), widths[column.name]))
        columns[column.name] = values
    return records(rows.schema, widths, columns, rows.nulls)


def to_rows(table: Table, layout: Layout, schema: Schema, note: str = "") -> Rows:
    """Records of shape [n] in memory. Raises DamagedRecord for columns or steps that are not the schema's."""
    fields = {f.name: (bit, f) for bit, f in enumerate(layout.fields)}
    columns: dict[str, NDArray[Any]] = {}
    nulls: dict[str, NDArray[np.bool_]] = {}
    with_nulls = int(np.bitwise_or.reduce(table[MASK]))
    for column in schema.columns:
        bit, field = fields.get(column.name, (None, Field(column.name, column.kind, 0, ())))
        if field.kind != column.kind:
            raise DamagedRecord(f"{schema.name}: {column.name} is {field.kind}, not {column.kind}")
        some = bit is None or bool(with_nulls >> bit & 1)
        if bit is not None and some:
            null = (table[MASK] & np.uint32(1 << bit)).astype(bool)
        else:
            null = np.full(len(table), some)
        if some and not column.nullable:
            raise DamagedRecord(f"{schema.name}: {column.name} is null or not there")
        columns[column.name] = _values(table, field, null, bit is not None)
        nulls[column.name] = null
    check_steps(columns["step"], schema)
    return Rows(schema, columns, nulls, note)


def framed(rows: bytes, count: int) -> bytes:
    """A block: `count` rows behind their marker and checksums."""
    start = struct.pack("<4sII", MARKER, count, crc32(rows))
    return b"".join((start, struct.pack("<I", crc32(start)), rows))


def parse_header(data: bytes) -> tuple[Layout, int] | None:
    """(layout, bytes of the header) of a file that begins with `data`; None where the header is not whole.

    Raises DamagedRecord for one of a newer format.
    """
    if len(data) < PREFIX.size:
        return None
    magic, length, crc = PREFIX.unpack_from(data)
    text = data[PREFIX.size : PREFIX.size + length]
    if magic != MAGIC or len(text) < length or crc != _header_crc(length, text):
        return None
    return _described(text), PREFIX.size + length


@lru_cache(maxsize=KEPT)
def _described(text: bytes) -> Layout:
    """The layout that the text of a header describes. Raises DamagedRecord."""
    try:
        body = json.loads(text)
        if body["format"] != FORMAT:
            raise DamagedRecord(f"format {body['format']}, this version reads up to {FORMAT}")
        fields = tuple(Field(f["name"], f["kind"], f["entries"], tuple(f["codes"])) for f in body["columns"])
        layout = Layout(body["record"], fields)
        assert layout.dtype.itemsize
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"its header describes no record ({type(error).__name__})") from error
    return layout


def rows_of_block(data: bytes, at: int) -> int | None:
    """How many rows the block at this byte states; None where its beginning is not intact."""
    if len(data) - at < BLOCK.size:
        return None
    marker, count, _, crc = BLOCK.unpack_from(data, at)
    intact = marker == MARKER and crc == crc32(data[at : at + BLOCK.size - 4])
    return int(count) if intact else None


def read_block(data: bytes, at: int, row_bytes: int) -> bytes | None:
    """The rows of the block at this byte; None where it is not whole."""
    count = rows_of_block(data, at)
    if not count:
        return None
    first = at + BLOCK.size
    rows = data[first : first + count * row_bytes]
    whole = len(rows) == count * row_bytes and BLOCK.unpack_from(data, at)[2] == crc32(rows)
    return rows if whole else None


def marked(data: bytes, start: int) -> Iterator[int]:
    """Bytes from `start` on at which the beginning of a block is intact."""
    at = data.find(MARKER, start)
    while at >= 0:
        if rows_of_block(data, at) is not None:
            yield at
        at = data.find(MARKER, at + 1)


def _header_crc(length: int, text: bytes) -> int:
    return crc32(text, crc32(MAGIC + struct.pack("<I", length)))


def _clear(table: Table, column: Column, bit: int, null: NDArray[np.bool_]) -> None:
    """Mark cells as null, and put zeros there."""
    table[MASK] |= np.where(null, np.uint32(1 << bit), np.uint32(0))
    where = null[..., None] if column.kind == "floats" else null
    np.copyto(table[column.name], 0, where=where, casting="unsafe")


def _codes(texts: NDArray[Any], null: NDArray[np.bool_], column: Column) -> NDArray[np.uint8]:
    if unknown := {str(t) for t in texts[~null]} - set(column.codes):
        raise DamagedRecord(f"{column.name}: {sorted(unknown)[0]!r} is none of {', '.join(column.codes)}")
    codes = np.zeros(len(texts), np.uint8)
    for code, text in enumerate(column.codes):
        codes[texts == text] = code
    return codes


def _values(table: Table, field: Field, null: NDArray[np.bool_], there: bool) -> NDArray[Any]:
    """One column as `trace.Rows` has it."""
    if field.kind == "text":
        return _texts(table[field.name], null, field) if there else np.full(len(table), None, object)
    if field.kind == "int":
        return table[field.name].astype(np.int64) if there else np.zeros(len(table), np.int64)
    if not there:
        return np.full((len(table), 0) if field.kind == "floats" else len(table), np.nan)
    values = table[field.name].astype(np.float64)
    values[null] = np.nan
    return values


def _texts(codes: NDArray[np.uint8], null: NDArray[np.bool_], field: Field) -> NDArray[Any]:
    if np.any(codes[~null] >= len(field.codes)):
        raise DamagedRecord(f"{field.name}: a code without a text")
    texts = np.array([*field.codes, None], dtype=object)
    return texts[np.where(null, len(field.codes), codes)]


TAIL = 64 * 1024
"""Bytes at the end of a file in which its last whole line lies: no write was longer."""


def read_json_lines(path: Path, schema: Schema) -> Rows:
    """The rows of a live record, which may be growing: a torn last line is left out and noted.

    Raises DamagedRecord for a bad line that has lines after it, a repeated, decreasing or missing step.
    """
    rows, good, size = _parse_lines(path, schema)
    note = f"torn last line of {size - good} bytes left out" if good < size else ""
    return from_dicts(rows, schema, note)


def cut_json_lines(path: Path, schema: Schema, next_step: int) -> tuple[int, int]:
    """Drop the torn last line and every row with step >= next_step. Returns (rows dropped, bytes cut); fsyncs.

    Raises DamagedRecord, and cuts nothing, where a bad line has lines after it: what follows it was committed.
    """
    keep = dropped = 0
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        for line in f:
            row = _parse(line) if line.endswith(b"\n") else None
            if row is None and f.read().strip(b"\0\n"):
                raise DamagedRecord(f"{path}: not a {schema.name} row at byte {keep}, with rows after it")
            if row is None or row["step"] >= next_step:
                dropped = 0 if row is None else 1 + sum(1 for rest in f if rest.endswith(b"\n"))
                break
            keep += len(line)
    disk.truncate_file(path, keep)
    return dropped, size - keep


def last_json_step(path: Path) -> int:
    """The step of the last whole line, -1 where there is none. Reads the end of the file only."""
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - TAIL))
        lines = f.read().split(b"\n")
    row = _parse(lines[-2]) if len(lines) > 1 else None
    return -1 if row is None else int(row["step"])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ok = isinstance(row, dict) and type(row.get("step")) is int
    return row if ok else None


def _parse_lines(path: Path, schema: Schema) -> tuple[list[dict[str, Any]], int, int]:
    """(rows, bytes of whole good lines, bytes in all)."""
    data = path.read_bytes()
    rows: list[dict[str, Any]] = []
    good = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        row = _parse(line) if line.endswith(b"\n") else None
        if row is None or not _well_typed(row, schema):
            if good + len(line) < len(data) and data[good + len(line) :].strip(b"\0\n"):
                raise DamagedRecord(f"{path}:{number}: not a {schema.name} row, with rows after it")
            return rows, good, len(data)
        expected = len(rows) if schema.contiguous else (rows[-1]["step"] + 1 if rows else 0)
        if row["step"] < expected or (schema.contiguous and row["step"] != expected):
            raise DamagedRecord(f"{path}:{number}: step {row['step']} where {expected} was expected")
        rows.append(row)
        good += len(line)
    return rows, good, len(data)


def _well_typed(row: dict[str, Any], schema: Schema) -> bool:
    for column in schema.columns:
        value = row.get(column.name)
        if value is None:
            if not column.nullable:
                return False
        elif column.kind == "floats":
            if not isinstance(value, list) or not all(_is_number(v) for v in value):
                return False
        elif column.kind == "text":
            if not isinstance(value, str):
                return False
        elif not _is_number(value) or (column.kind == "int" and type(value) is not int):
            return False
    return True


def _is_number(value: Any) -> bool:
    """A float, or a whole number that an int64 holds (JSON has no limit, numpy raises); True and False are none."""
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)
