"""CSV, JSON and Parquet with any columns."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from stabstudy.ingesting import lines, several
from stabstudy.ingesting.choice import listed
from stabstudy.ingesting.points import LogError, Raw

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_TEXT = (".csv", ".tsv")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*")


def read(paths: Sequence[Path], given: Mapping[str, str]) -> list[Raw]:
    """The runs in a table, or in the charts of the same runs. `given`: ours -> the table's column, by the user."""
    raw = Raw("table")
    for path in paths:
        raw.rows += _rows(path, raw)
    if not raw.rows:
        raise LogError(f"has no row with a step and a loss or gradient norm (columns: {listed(columns(paths[0]))})")
    return several.runs(raw, given)


def columns(path: Path) -> list[str]:
    """The names of a table's columns, from its beginning. Raises LogError where it has none."""
    if lines.suffix(path) == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    if lines.suffix(path) in _TEXT:
        return _header(path)[0]
    if not (found := lines.keys(path)):
        raise LogError("is empty" if path.stat().st_size == 0 else "has no line that is a JSON object")
    return found


def _rows(path: Path, raw: Raw) -> Iterator[Mapping[str, Any]]:
    suffix = lines.suffix(path)
    if suffix == ".parquet":
        yield from map(lines.flat, _parquet_rows(path))
    elif suffix in _TEXT:
        yield from _csv_rows(path, raw)
    elif suffix == ".json" and (listed := _listed(path)) is not None:
        yield from map(lines.flat, listed)
    else:
        yield from lines.rows(path, raw)


def _listed(path: Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON list; None for a file that is none."""
    with lines.opened(path) as f:
        data = f.read()
    try:
        body = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"["):
            raise LogError(f"is not JSON ({error})") from error
        return None
    if not isinstance(body, list):
        return None
    if not (objects := [row for row in body if isinstance(row, dict)]):
        raise LogError("must hold a JSON object, or a list of them")
    return objects


def _csv_rows(path: Path, raw: Raw) -> Iterator[dict[str, str]]:
    header, delimiter = _header(path)
    odd = last = end = 0
    with _text(path) as f:
        f.readline()
        cells = csv.reader(f, delimiter=delimiter)
        try:
            for end, row in enumerate(cells, 1):
                if len(row) == len(header):
                    yield dict(zip(header, _decimal(row) if delimiter == ";" else row, strict=True))
                elif row:
                    odd, last = odd + 1, end
        except csv.Error as error:
            rest = 1 + sum(1 for _ in f)
            raw.lose(f"from line {cells.line_num + 1} on, unreadable ({error})", rest)
    if odd:
        raw.lose("rows with more or fewer fields than columns", odd)
        raw.lost -= last == end  # the last one was being written


def _decimal(row: list[str]) -> list[str]:
    """Numbers with a decimal comma, which stand in files that are separated otherwise, as others write them."""
    return [cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell for cell in row]


def _header(path: Path) -> tuple[list[str], str]:
    """The names of a CSV file's columns, and what separates them."""
    with lines.opened(path) as f:
        try:
            line = f.readline(2**20).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise LogError("is not UTF-8 text") from error
    if not line.strip():
        raise LogError("is empty")
    delimiter = max(",\t;", key=line.count)
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))], delimiter
    except csv.Error as error:
        raise LogError(f"is not CSV ({error})") from error


def _text(path: Path) -> TextIO:
    """The lines of a CSV file; a byte that is no UTF-8 damages its own field alone."""
    return io.TextIOWrapper(lines.opened(path), encoding="utf-8-sig", errors="replace", newline="")


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is not a Parquet file ({str(error).splitlines()[0]})") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in _parquet(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is a damaged Parquet file ({str(error).splitlines()[0]})") from error
