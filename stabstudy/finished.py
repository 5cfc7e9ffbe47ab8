"""The finished form of a record: one Parquet file with page checksums, whose sha256 stands in the trial's state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import disk, live
from stabstudy.trace import Column, DamagedRecord, Rows, Schema, as_array, check_steps
from stabstudy.wording import first_line

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
CLOCK = ("seconds",)
"""The columns that are wall time: two equal trainings differ in them."""


def read_whole(live_path: Path, schema: Schema) -> Rows:
    """A live record that grows no more. Raises DamagedRecord where its end is torn."""
    rows = live.read(live_path, schema)
    if rows.note:
        raise DamagedRecord(f"{live_path}: {rows.note}")
    return rows


def write(rows: Rows, parquet: Path, metadata: Mapping[str, str], synced: disk.Synced = "folder") -> str:
    """The rows as a finished record, whole or not at all. Returns the sha256 that belongs into the trial's state.

    `synced`: see `disk.replace_file`; the folder must be when the state is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = rows.schema
    table = _to_arrow(rows).replace_schema_metadata({"format": str(FORMAT), "record": schema.name, **metadata})
    leaves = {"float": "{}", "floats": "{}.list.element"}
    floats = [leaves[c.kind].format(c.name) for c in schema.columns if c.kind in leaves]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=["skip"] if "skip" in schema.names else False,
        column_encoding={name: "BYTE_STREAM_SPLIT" for name in floats},
        write_page_checksum=True,
        write_statistics=False,  # one row group, always read whole
    )
    data = memoryview(sink.getvalue())
    disk.replace_file(parquet, data, synced=synced)
    return hashlib.sha256(data).hexdigest()


def values_sha256(rows: Rows) -> str:
    """Hex sha256 of all values but those of CLOCK: equal for equal trainings, also one that was killed and resumed."""
    digest = hashlib.sha256(f"{rows.schema.name} {len(rows)}".encode())
    for column in rows.schema.columns:
        if column.name in CLOCK:
            continue
        values, null = rows[column.name].copy(), rows.is_null(column.name)
        values[null] = "" if column.kind == "text" else 0
        digest.update(column.name.encode() + null.tobytes())
        digest.update(json.dumps(values.tolist()).encode() if column.kind == "text" else values.tobytes())
    return digest.hexdigest()


def read_parquet(path: Path, schema: Schema, sha256: str | None = None, columns: Sequence[str] | None = None) -> Rows:
    """A finished record. With `sha256` the file's bytes are checked first. `columns` limits what is read (plus step).

    Raises DamagedRecord for a wrong checksum, another record's file, a newer format, a column that every row must
    have, or wrong steps.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = None if sha256 is None or columns is not None else path.read_bytes()
    actual = hashlib.sha256(data).hexdigest() if data is not None else sha256 and disk.file_sha256(path)
    if actual != sha256:
        raise DamagedRecord(f"{path}: sha256 is {str(actual)[:12]}..., in state.json {str(sha256)[:12]}...")
    try:
        with path.open("rb") if data is None else pa.BufferReader(data) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            meta = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
            wanted = [n for n in file.schema_arrow.names if columns is None or n in columns or n == "step"]
            table = file.read(columns=wanted, use_threads=False)  # which cost more than they save on one trial
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedRecord(f"{path}: {first_line(error)}") from error
    if meta.get("record") != schema.name:
        raise DamagedRecord(f"{path}: holds {meta.get('record', 'no known record')}, not {schema.name}")
    if not meta.get("format", "").isdigit() or int(meta["format"]) > FORMAT:
        raise DamagedRecord(f"{path}: format {meta.get('format')}, this version reads up to {FORMAT}")
    if missing := [c.name for c in schema.columns if not c.nullable and c.name not in file.schema_arrow.names]:
        raise DamagedRecord(f"{path}: lacks the column {', '.join(missing)}")
    present = [c for c in schema.columns if columns is None or c.name in columns or c.name == "step"]
    return _from_arrow(table, replace(schema, columns=tuple(present)))


def _to_arrow(rows: Rows) -> pa.Table:
    import pyarrow as pa

    arrays: dict[str, Any] = {}
    for column in rows.schema.columns:
        values, null = rows[column.name], rows.is_null(column.name)
        if column.kind == "floats":
            arrays[column.name] = _lists(values, null)
        else:
            # from_pandas=False: a NaN stays NaN, only the mask makes a null
            mask = null if null.any() else None
            arrays[column.name] = pa.array(values, type=_arrow_type(column), mask=mask, from_pandas=False)
    return pa.table(arrays)


def _lists(values: NDArray[Any], null: NDArray[np.bool_]) -> pa.Array:
    """Shape [rows, entries] as a column of lists; a null row has no entries."""
    import pyarrow as pa

    if not null.any():
        ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values.ravel(), from_pandas=False))
    ends = np.concatenate(([0], np.cumsum(np.where(null, 0, values.shape[1])))).astype(np.int32)
    entries = pa.array(values[~null].ravel(), type=pa.float64(), from_pandas=False)
    return pa.ListArray.from_arrays(pa.array(ends), entries, mask=pa.array(null))


def _arrow_type(column: Column) -> pa.DataType:
    import pyarrow as pa

    kinds = {"int": pa.int64(), "float": pa.float64(), "text": pa.string(), "floats": pa.list_(pa.float64())}
    return kinds[column.kind]


def _from_arrow(table: pa.Table, schema: Schema) -> Rows:
    columns: dict[str, NDArray[Any]] = {}
    nulls: dict[str, NDArray[np.bool_]] = {}
    for column in schema.columns:
        if column.name not in table.column_names:
            columns[column.name], nulls[column.name] = as_array([None] * len(table), column)
            continue
        data = table.column(column.name).combine_chunks()
        if data.type != _arrow_type(column) or (data.null_count and not column.nullable):
            raise DamagedRecord(f"{schema.name}: {column.name} is {data.type} with {data.null_count} nulls")
        null = np.zeros(len(data), bool)
        if data.null_count:
            null = np.asarray(data.is_null().to_numpy(zero_copy_only=False), dtype=bool)
        nulls[column.name] = null
        if column.kind == "floats":
            columns[column.name] = _floats(data, null, column)
        elif column.kind == "text":
            columns[column.name] = np.array(data.to_pylist(), dtype=object)
        elif column.kind == "int":
            columns[column.name] = data.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            columns[column.name] = data.fill_null(np.nan).to_numpy(zero_copy_only=False)
    check_steps(columns["step"], schema)
    return Rows(schema, columns, nulls)


def _floats(data: Any, null: NDArray[np.bool_], column: Column) -> NDArray[Any]:
    """A column of lists as a table: [rows, width], NaN where a row is null. No list in Python: a page reads many."""
    lengths = data.value_lengths().drop_null().to_numpy(zero_copy_only=False)
    width = int(lengths.max(initial=0))
    if np.any(lengths != width):
        raise DamagedRecord(f"{column.name}: rows of different lengths")
    table = np.full((len(data), width), np.nan)
    table[~null] = data.flatten().fill_null(np.nan).to_numpy(zero_copy_only=False).reshape(len(lengths), width)
    return table
