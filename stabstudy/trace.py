"""The record of a trial: its columns, and the live form that grows while the trial runs.

Two tables share one mechanism. The *trace* has one row per optimizer step, no gaps, no sentinels; *probes* has one row
on each step where something costly was measured. While the trial runs, rows are JSON lines (bare NaN and Infinity are
kept; null means "not applicable") appended with one `os.write` per flush, so a kill at any moment leaves at most one
torn last line. When it ends, `finished.compact` turns the lines into one Parquet file.

Null and NaN are different answers: `clip_scale` null means "clipping was off", NaN "the norm was not finite". The
reader keeps them apart (`Rows.is_null`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MAX_WRITE = 64 * 1024
FLUSH_SECONDS = 1.0

Kind = Literal["int", "float", "text", "floats"]

SKIPS = ("amp", "nonfinite", "spike", "no_targets")
"""The policies that skip an update. Where a skip is a number, 0 is none, and policy i is i + 1."""


@dataclass(frozen=True)
class Column:
    """One column: its type (`floats`: a fixed-length list), whether null is a legal answer, unit, meaning."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Schema:
    """The columns of one record. `contiguous`: steps must be 0, 1, 2, ... without gaps."""

    name: str
    columns: tuple[Column, ...]
    contiguous: bool

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.columns]


TRACE = Schema(
    "trace",
    (
        Column("step", "int", "", "0-based optimizer step"),
        Column("tokens", "int", "token", "targets seen, this step included"),
        Column("seconds", "float", "s", "wall time of this step"),
        Column("lr", "float", "", "scheduled learning rate used by this update"),
        Column("loss", "float", "nat/token", "cross-entropy summed over all micro-batches / valid targets", True),
        Column("grad_norm", "float", "gradient", "global L2 norm BEFORE clipping, unscaled", True),
        Column("clip_scale", "float", "1", "factor applied by clipping; null: clipping off", True),
        Column(
            "layer_grad_norm", "floats", "gradient", "norm of embed, layer 0..L-1, head (with the final norm)", True
        ),
        Column("logit_absmax", "float", "nat", "largest absolute output logit on valid targets", True),
        Column("logz_mean", "float", "nat", "mean logsumexp of the output logits on valid targets", True),
        Column("loss_scale", "float", "1", "fp16 scaler value used at this step; null: no scaler", True),
        Column("skip", "text", "", f"policy that skipped the update: {' | '.join(SKIPS)}; null: none", True),
    ),
    contiguous=True,
)

LOG = replace(TRACE, columns=tuple(replace(c, nullable=c.name != "step") for c in TRACE.columns))
"""The trace of a run trained elsewhere: what its log lacks is null. Row i is a logged step, not step i."""

PROBES = Schema(
    "probes",
    (
        Column("step", "int", "", "state after this many updates (0: the initial weights)"),
        Column("val_loss", "float", "nat/token", "loss on the fixed set of the periodic evaluation", True),
        Column(
            "update_rms",
            "float",
            "1",
            "RMS over all elements of m_hat/(sqrt(v_hat)+eps) of the last update; null: none, or not Adam",
            True,
        ),
        Column(
            "adam_rms_max",
            "float",
            "1",
            "max over tensors of sqrt(mean(g^2/max(v_hat, eps^2))) in it; null: no update, or not Adam",
            True,
        ),
        Column("attn_logit_max", "floats", "nat", "per layer: largest unmasked q.k/sqrt(head_dim)", True),
        Column(
            "attn_entropy",
            "floats",
            "1",
            "per layer: mean attention entropy / log(positions), position 0 left out",
            True,
        ),
        Column("resid_rms", "floats", "1", "per layer: RMS of the residual stream after it", True),
        Column("param_norm", "float", "1", "L2 norm of all weights", True),
        Column(
            "noise_g2",
            "float",
            "gradient^2",
            "squared norm of the true gradient, estimated from one step's batch",
            True,
        ),
        Column(
            "noise_s", "float", "gradient^2 token", "trace of the covariance of one token's gradient, likewise", True
        ),
        Column(
            "noise_scale",
            "float",
            "token",
            "moving mean of noise_s / that of noise_g2, each keeping 0.9 per probe; "
            "all three null: one micro-batch; it alone: mean noise_g2 <= 0",
            True,
        ),
    ),
    contiguous=False,
)


class DamagedRecord(Exception):
    """A record that cannot be trusted: a bad line with good lines after it, a wrong step, a wrong checksum."""


@dataclass(frozen=True)
class Rows:
    """A record in memory: one array per column, float64 (null as NaN, see `is_null`), int64, or object for text.

    `layer_grad_norm` and the other lists have shape [rows, entries]. Columns that a file of an older version lacks
    are present and all null.
    """

    schema: Schema
    columns: Mapping[str, NDArray[Any]]
    nulls: Mapping[str, NDArray[np.bool_]]
    note: str = ""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def is_null(self, name: str) -> NDArray[np.bool_]:
        """Shape [rows]: True where the column was null ("not applicable"), False for numbers and NaN."""
        return self.nulls[name]

    def has(self, name: str) -> bool:
        """Whether any row has an answer in this column."""
        return bool((~self.nulls[name]).any())


class RowWriter:
    """Appends rows to a live `.jsonl`. Not thread-safe; one writer per file, guarded by the trial's lock.

    Raises OSError when the disk refuses (full, read-only): the file is first cut back to its last whole line.
    """

    def __init__(self, path: Path, schema: Schema, clock: Callable[[], float] = time.monotonic):
        self.path, self.schema, self._clock = path, schema, clock
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._fd).st_size
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._flushed_at = clock()

    def append(self, row: Mapping[str, Any], urgent: bool = False) -> None:
        """Queue one row. It reaches the file at once when `urgent` (an anomaly), else within a second."""
        line = json.dumps({c: row[c] for c in self.schema.names}, separators=(",", ":")).encode() + b"\n"
        if self._pending and self._pending_bytes + len(line) > MAX_WRITE:
            self.flush()
        self._pending.append(line)
        self._pending_bytes += len(line)
        if urgent or self._clock() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Write what is queued with one `os.write`; with `sync` also fsync (before a checkpoint, at the end)."""
        if self._pending:
            block = b"".join(self._pending)
            try:
                written = os.write(self._fd, block)
                if written != len(block):
                    raise OSError(f"short write to {self.path}: {written} of {len(block)} bytes")
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._size)
                raise
            self._size += len(block)
            self._pending, self._pending_bytes = [], 0
        self._flushed_at = self._clock()
        if sync:
            os.fsync(self._fd)

    def close(self) -> None:
        """Flush, fsync and close. Safe to call twice."""
        if self._fd >= 0:
            try:
                self.flush(sync=True)
            finally:
                os.close(self._fd)
                self._fd = -1


def no_rows(schema: Schema) -> Rows:
    """A record without rows: that of a trial which has not started."""
    return _from_dicts([], schema)


def read_jsonl(path: Path, schema: Schema) -> Rows:
    """The rows of a live record, which may be growing: a torn last line is left out and noted.

    Raises DamagedRecord for a bad line that has lines after it, a repeated, decreasing or missing step.
    """
    rows, good, size = _parse_lines(path, schema)
    note = f"torn last line of {size - good} bytes left out" if good < size else ""
    return _from_dicts(rows, schema, note)


def cut(path: Path, schema: Schema, next_step: int) -> tuple[int, int]:
    """Before a new attempt: drop the torn last line and every row with step >= next_step.

    Returns (rows dropped, bytes cut); fsyncs. A file that does not exist has nothing to cut. Raises DamagedRecord, and
    cuts nothing, where a bad line has lines after it: what follows it was committed.
    """
    if not path.exists():
        return 0, 0
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
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, keep)
        os.fsync(fd)
    finally:
        os.close(fd)
    return dropped, size - keep


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_file(path: Path) -> str:
    """fsync a written file; returns its sha256."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return file_sha256(path)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def _from_dicts(rows: list[dict[str, Any]], schema: Schema, note: str = "") -> Rows:
    columns: dict[str, NDArray[Any]] = {}
    nulls: dict[str, NDArray[np.bool_]] = {}
    for column in schema.columns:
        values = [row.get(column.name) for row in rows]
        columns[column.name], nulls[column.name] = as_array(values, column)
    return Rows(schema, columns, nulls, note)


def as_array(values: list[Any], column: Column) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(values, nulls) of one column; None is null. Raises DamagedRecord for lists of different lengths."""
    null = np.array([v is None for v in values], dtype=bool)
    if column.kind == "int":
        return np.array([0 if v is None else v for v in values], dtype=np.int64), null
    if column.kind == "text":
        return np.array(values, dtype=object), null
    if column.kind == "float":
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64), null
    width = max((len(v) for v in values if v is not None), default=0)
    if any(v is not None and len(v) != width for v in values):
        raise DamagedRecord(f"{column.name}: rows of different lengths")
    table = np.full((len(values), width), np.nan)
    for i, v in enumerate(values):
        if v is not None:
            table[i] = v
    return table, null
