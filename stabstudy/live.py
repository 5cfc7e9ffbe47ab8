"""The live form of a record: a file that grows by whole blocks of binary records while its trial runs.

A block is one `os.write`, so a kill at any moment leaves at most one torn block at the end, which is cut whole when the
trial resumes; damage that is followed by rows is told from that and is an error (RELIABILITY D1, D4). A study that an
older version began has JSON lines (`trace.jsonl`): they are read and cut as well, and rewritten once before rows are
appended. Functions take the path of the `.live` file and find the other form beside it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stabstudy import disk, encodings, failpoints
from stabstudy.encodings import Layout, Table, from_rows, record_type, records, to_rows
from stabstudy.trace import DamagedRecord, Rows, Schema, no_rows

__all__ = ["Writer", "cut", "find", "from_rows", "last_step", "read", "record_type", "records", "to_rows", "upgrade"]

MAX_WRITE = 64 * 1024
FLUSH_SECONDS = 1.0
HEADER_BYTES = 16 * 1024
"""Bytes at the beginning of a file in which its header lies."""


class Writer:
    """Appends blocks of rows to a `.live` file; one writer per file, guarded by the trial's lock.

    Not thread-safe, but for `sync`. Raises OSError when the disk refuses (full, read-only): the file is first cut back
    to its last whole block, and what was queued stays queued. Raises DamagedRecord for a file with other columns, or
    where a record of JSON lines waits for `upgrade`.
    """

    def __init__(
        self, path: Path, schema: Schema, widths: Mapping[str, int], clock: Callable[[], float] = time.monotonic
    ):
        if path.with_suffix(".jsonl").exists():
            raise DamagedRecord(f"{path.with_suffix('.jsonl')}: must be upgraded before rows are appended")
        self.path, self.schema, self._clock = path, schema, clock
        self._layout = encodings.layout(schema, widths)
        self.dtype = self._layout.dtype
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._closing = threading.Lock()
        self._size = os.fstat(self._fd).st_size
        try:
            _check_header(path, os.pread(self._fd, HEADER_BYTES, 0), self._layout)
        except DamagedRecord:
            os.close(self._fd)
            raise
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._flushed_at = clock()

    def append(self, block: Table, urgent: bool = False) -> None:
        """Queue rows, shape [n], copied. They reach the file at once when `urgent` (an anomaly), else in a second."""
        if block.dtype != self.dtype or block.ndim != 1:
            raise ValueError(f"{self.path.name}: takes rows of shape [n] of its own record_type")
        if self._pending and self._pending_bytes + block.nbytes > self._room():
            self.flush()
        self._pending.append(block.tobytes())
        self._pending_bytes += block.nbytes
        if urgent or self._clock() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Write what is queued as one block (more where 64 KiB do not hold it); with `sync` also fsync."""
        rows = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        try:
            while rows:
                part = rows[: self._room()]
                self._write(part)
                rows = rows[len(part) :]
        finally:
            self._pending, self._pending_bytes = [rows] if rows else [], len(rows)
        self._flushed_at = self._clock()
        if sync:
            self.sync()

    def sync(self) -> None:
        """Make durable what was flushed. Any thread may call it; a closed file is durable."""
        with self._closing:
            if self._fd >= 0:
                os.fsync(self._fd)
                failpoints.hit("live.synced")

    def close(self) -> None:
        """Flush, fsync and close. Safe to call twice."""
        if self._fd < 0:
            return
        try:
            self.flush(sync=True)
        finally:
            with self._closing:
                os.close(self._fd)
                self._fd = -1

    def _room(self) -> int:
        """Bytes of whole rows that the next write holds."""
        taken = encodings.BLOCK.size + (0 if self._size else len(self._layout.header))
        return max(1, (MAX_WRITE - taken) // self.dtype.itemsize) * self.dtype.itemsize

    def _write(self, rows: bytes) -> None:
        block = encodings.framed(rows, len(rows) // self.dtype.itemsize)
        if not self._size:
            block = self._layout.header + block
        failpoints.hit("live.write")
        try:
            failpoints.hit("live.short_write", lambda: os.write(self._fd, block[: len(block) // 2]))
            written = os.write(self._fd, block)
            if written != len(block):
                raise OSError(errno.ENOSPC, f"short write, {written} of {len(block)} bytes")
        except OSError as error:
            error.filename = str(self.path)
            failpoints.hit("live.truncate")
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(block)
        failpoints.hit("live.written")


def find(path: Path) -> Path | None:
    """The file that holds the record of this `.live` path: it, else the `.jsonl` beside it, else None."""
    older = path.with_suffix(".jsonl")
    return path if path.exists() else older if older.exists() else None


def read(path: Path, schema: Schema) -> Rows:
    """The rows of a live record, which may be growing: a torn last block is left out and noted.

    Raises DamagedRecord for a bad block that has rows after it, a wrong step, other columns, a newer format;
    FileNotFoundError where there is no record.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):  # of an older study, perhaps upgraded since the line above
            return encodings.read_json_lines(path.with_suffix(".jsonl"), schema)
        data = path.read_bytes()
    return _rows(_scan(data, path), path, schema)


def cut(path: Path, schema: Schema, next_step: int) -> tuple[int, int]:
    """Before a new attempt: drop the torn tail and every row with step >= next_step.

    Returns (rows dropped, bytes cut); fsyncs. A file that does not exist has nothing to cut. A cut within a block
    replaces the file whole, so that a kill loses no row below `next_step`. Raises DamagedRecord, and cuts nothing,
    where a bad block has rows after it: they were committed.
    """
    _settle(path, schema)
    file = find(path)
    if file is None:
        return 0, 0
    if file != path:
        return encodings.cut_json_lines(file, schema, next_step)
    content = _scan(path.read_bytes(), path)
    if content.layout is None:
        disk.truncate_file(path, 0)
        return 0, content.size
    table = content.table()
    late = np.flatnonzero(table["step"] >= next_step)
    kept = int(late[0]) if len(late) else len(table)
    size = content.end_of(kept)
    if size is not None:
        disk.truncate_file(path, size)
    else:
        size = _replace(path, content.layout, table[:kept])
    return len(table) - kept, content.size - size


def last_step(path: Path) -> int:
    """The step of the last whole row, -1 where there is none. Reads the header and the end of the file only.

    Raises DamagedRecord for a newer format, OSError for a file that cannot be read.
    """
    file = find(path)
    if file is None:
        return -1
    if file != path:
        return encodings.last_json_step(file)
    with path.open("rb") as f:
        head = _header(f.read(HEADER_BYTES), path)
        if head is None:
            return -1
        layout, start = head
        tail = 2 * max(MAX_WRITE, layout.dtype.itemsize + encodings.BLOCK.size)  # one whole block, behind it a torn one
        f.seek(max(start, f.seek(0, os.SEEK_END) - tail))
        data = f.read()
    for at in reversed(list(encodings.marked(data, 0))):
        if rows := encodings.read_block(data, at, layout.dtype.itemsize):
            return int(np.frombuffer(rows, layout.dtype)["step"][-1])
    return -1


def upgrade(path: Path, schema: Schema, widths: Mapping[str, int]) -> bool:
    """Bring a record to the form that a `Writer` appends to, atomically; whether it had another one.

    JSON lines (their torn tail left out) become a `.live` file, and are removed when it is durable; a `.live` file
    without the columns of today gets them. Raises DamagedRecord where rows do not fit the schema and widths.
    """
    settled = _settle(path, schema)
    layout, file = encodings.layout(schema, widths), find(path)
    if file is None or (file == path and _agrees(path, layout)):
        return settled
    rows = read(path, schema)
    if file == path and rows.note:
        raise DamagedRecord(f"{path}: {rows.note}")
    try:
        _replace(path, layout, from_rows(rows, widths))
    except DamagedRecord as error:
        raise DamagedRecord(f"{file}: {error}") from error
    _settle(path, schema)
    return True


def _settle(path: Path, schema: Schema) -> bool:
    """Where an upgrade was killed before it removed the JSON lines: remove them, if the new file has their rows."""
    older = path.with_suffix(".jsonl")
    if not (path.exists() and older.exists()):
        return False
    new, old = read(path, schema), encodings.read_json_lines(older, schema)
    if not all(_begins_with(new, old, name) for name in schema.names):
        raise DamagedRecord(f"{path}: lacks rows that {older.name} has; one of the two must go")
    older.unlink()
    disk.sync_folder(path.parent)
    return True


def _begins_with(new: Rows, old: Rows, name: str) -> bool:
    n, null = len(old), old.is_null(name)
    if len(new) < n or not np.array_equal(new.is_null(name)[:n], null):
        return False
    a, b = new[name][:n][~null], old[name][~null]
    return np.array_equal(a, b, equal_nan=a.dtype == np.float64) if a.size or b.size else True


@dataclass(frozen=True)
class _Content:
    """What a file holds: its layout (None: no whole header), its good blocks as (byte of the first row, bytes)."""

    data: bytes
    layout: Layout | None
    blocks: tuple[tuple[int, int], ...]
    good: int

    @property
    def size(self) -> int:
        return len(self.data)

    def table(self) -> Table:
        """Shape [rows]; not writable."""
        assert self.layout is not None
        view = memoryview(self.data)
        return np.frombuffer(b"".join(view[at : at + size] for at, size in self.blocks), self.layout.dtype)

    def end_of(self, rows: int) -> int | None:
        """The size of the file with these first rows only; None where they end within a block."""
        assert self.layout is not None
        ends = np.cumsum([0] + [size for _, size in self.blocks]) // self.layout.dtype.itemsize
        block = int(np.searchsorted(ends, rows))
        if ends[block] != rows:
            return None
        return sum(self.blocks[block - 1]) if block else len(self.layout.header)


def _scan(data: bytes, path: Path) -> _Content:
    """Walk the blocks of a file. Raises DamagedRecord for a bad one with rows after it, or a newer format."""
    head = _header(data, path)
    if head is None:
        _check_tail(data, 0, None, path)
        return _Content(data, None, (), 0)
    layout, at = head
    blocks: list[tuple[int, int]] = []
    while at < len(data):
        rows = encodings.read_block(data, at, layout.dtype.itemsize)
        if rows is None:
            _check_tail(data, at, layout, path)
            break
        blocks.append((at + encodings.BLOCK.size, len(rows)))
        at += encodings.BLOCK.size + len(rows)
    return _Content(data, layout, tuple(blocks), at)


def _check_tail(data: bytes, at: int, layout: Layout | None, path: Path) -> None:
    """Raises DamagedRecord unless the bad bytes from `at` on are what a kill or a power cut leaves at the end."""
    later = next(encodings.marked(data, at + 1), None)
    count = None if layout is None else encodings.rows_of_block(data, at)
    end = len(data) if layout is None or count is None else at + encodings.BLOCK.size + count * layout.dtype.itemsize
    if later is not None or data[end:].strip(b"\0"):
        raise DamagedRecord(f"{path}: bad bytes from byte {at} on, with rows after them")


def _rows(content: _Content, path: Path, schema: Schema) -> Rows:
    torn = content.size - content.good
    note = f"torn last block of {torn} bytes left out" if torn else ""
    if content.layout is None:
        empty = no_rows(schema)
        return Rows(schema, empty.columns, empty.nulls, note)
    if content.layout.record != schema.name:
        raise DamagedRecord(f"{path}: holds {content.layout.record}, not {schema.name}")
    try:
        return to_rows(content.table(), content.layout, schema, note)
    except DamagedRecord as error:
        raise DamagedRecord(f"{path}: {error}") from error


def _header(data: bytes, path: Path) -> tuple[Layout, int] | None:
    try:
        return encodings.parse_header(data)
    except DamagedRecord as error:
        raise DamagedRecord(f"{path}: {error}") from error


def _check_header(path: Path, data: bytes, layout: Layout) -> None:
    if data and not data.startswith(layout.header):
        _header(data, path)  # a newer format has a message of its own
        raise DamagedRecord(f"{path}: its header has other columns than the rows to be appended")


def _agrees(path: Path, layout: Layout) -> bool:
    with path.open("rb") as f:
        data = f.read(len(layout.header))
    return not data or data == layout.header


def _replace(path: Path, layout: Layout, table: Table) -> int:
    """Write a file of these rows whole, durable before it gets its name. Returns its bytes."""
    step = max(1, (MAX_WRITE - encodings.BLOCK.size) // layout.dtype.itemsize)
    parts = [table[i : i + step] for i in range(0, len(table), step)]
    data = layout.header + b"".join(encodings.framed(part.tobytes(), len(part)) for part in parts)
    disk.replace_file(path, data)
    return len(data)
