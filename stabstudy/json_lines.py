"""Live records of studies that older versions began: one JSON object per line, read and cut but no longer written.

Bare NaN and Infinity are numbers, null means "not applicable". A kill leaves at most one torn last line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stabstudy.trace import DamagedRecord, Rows, Schema, cut_file, from_dicts

TAIL = 64 * 1024
"""Bytes at the end of a file in which its last whole line lies: no write was longer."""


def read(path: Path, schema: Schema) -> Rows:
    """The rows of a live record, which may be growing: a torn last line is left out and noted.

    Raises DamagedRecord for a bad line that has lines after it, a repeated, decreasing or missing step.
    """
    rows, good, size = _parse_lines(path, schema)
    note = f"torn last line of {size - good} bytes left out" if good < size else ""
    return from_dicts(rows, schema, note)


def cut(path: Path, schema: Schema, next_step: int) -> tuple[int, int]:
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
    cut_file(path, keep)
    return dropped, size - keep


def last_step(path: Path) -> int:
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
