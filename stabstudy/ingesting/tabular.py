"""CSV, JSON lines and Parquet with any columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from stabstudy.ingesting import lines, names
from stabstudy.ingesting.points import LogError, Raw

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def read(path: Path, given: Mapping[str, str]) -> Raw:
    """Every row with a step. `given`: ours -> the table's column, for those that are not known by their names."""
    raw = Raw("table")
    named = names.match(columns(path), given)
    for row in _rows(path, raw, list(named.values())):
        raw.take(row, named)
    raw.notes.append("columns: " + ", ".join(f"{ours}={theirs}" for ours, theirs in named.items()))
    return raw


def columns(path: Path) -> list[str]:
    """The names of a table's columns, from its beginning. Raises LogError where it has none."""
    if path.suffix == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    if path.suffix in (".csv", ".tsv"):
        with _text(path) as f:
            return _header(f)
    if not (found := lines.keys(path)):
        raise LogError("is empty" if path.stat().st_size == 0 else "has no line that is a JSON object")
    return found


def _rows(path: Path, raw: Raw, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, wanted)
    elif path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, raw)
    else:
        yield from lines.rows(path, raw)


def _csv_rows(path: Path, raw: Raw) -> Iterator[dict[str, str]]:
    with _text(path) as f:
        header = _header(f)
        f.seek(0)
        cells = csv.reader(f, delimiter=_delimiter(f.readline()))
        try:
            for row in cells:
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                elif row:
                    raw.left_out["rows with more or fewer fields than columns"] += 1
        except (csv.Error, UnicodeDecodeError) as error:
            raw.left_out[f"from line {cells.line_num + 2} on, unreadable ({type(error).__name__})"] += 1


def _header(f: TextIO) -> list[str]:
    try:
        line = f.readline(2**20)
    except UnicodeDecodeError as error:
        raise LogError("is not UTF-8 text") from error
    if not line.strip():
        raise LogError("is empty")
    try:
        return next(csv.reader([line], delimiter=_delimiter(line)))
    except csv.Error as error:
        raise LogError(f"is not CSV ({error})") from error


def _delimiter(line: str) -> str:
    return max(",\t;", key=line.count)


def _text(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is not a Parquet file ({str(error).splitlines()[0]})") from error


def _parquet_rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in _parquet(path).iter_batches(columns=list(wanted)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is a damaged Parquet file ({str(error).splitlines()[0]})") from error
