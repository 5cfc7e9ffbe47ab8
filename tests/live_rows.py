"""Live records for tests, from rows given as dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabstudy import finished, live
from stabstudy.encodings import Table
from stabstudy.trace import TRACE, Schema, from_dicts

Row = Mapping[str, Any]


def entries(rows: Sequence[Row], schema: Schema = TRACE) -> dict[str, int]:
    """Entries of each list: those of the rows, 0 where all are null."""
    read = from_dicts(rows, schema)
    return {c.name: read[c.name].shape[1] for c in schema.columns if c.kind == "floats"}


def table(rows: Sequence[Row], schema: Schema = TRACE, widths: Mapping[str, int] | None = None) -> Table:
    return live.from_rows(from_dicts(rows, schema), entries(rows, schema) if widths is None else widths)


def write(
    path: Path,
    rows: Sequence[Row],
    schema: Schema = TRACE,
    widths: Mapping[str, int] | None = None,
    per_block: int = 10**6,
) -> Path:
    """Append the rows to the record at `path`, in blocks of `per_block` rows."""
    widths = entries(rows, schema) if widths is None else widths
    writer, whole = live.Writer(path, schema, widths), table(rows, schema, widths)
    for start in range(0, len(whole), per_block):
        writer.append(whole[start : start + per_block])
        writer.flush()
    writer.close()
    return path


def write_json_lines(path: Path, rows: Sequence[Row]) -> Path:
    """What older versions wrote."""
    path.write_text("".join(json.dumps(dict(r), separators=(",", ":")) + "\n" for r in rows))
    return path


def compact(path: Path, parquet: Path, schema: Schema, metadata: dict[str, str]) -> tuple[int, str]:
    """What a trial does at its end: (rows, sha256)."""
    rows = finished.read_whole(path, schema)
    return len(rows), finished.write(rows, parquet, metadata)
