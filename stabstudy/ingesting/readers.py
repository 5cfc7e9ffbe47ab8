"""Readers of logs that programs write: JSON lines, CSV, JSON, Parquet, Trainer states, TensorBoard's event files.

A table (CSV, JSON lines, JSON, Parquet) has any columns. Hugging Face Trainer's trainer_state.json and LLaMA-Factory's
trainer_log.jsonl are one run, with one or both of them; Lingua's metrics.jsonl has names of its own. Event files are
read by TensorBoard's own reader (the extra `tensorboard`). Text files may be gzip, and cut at any byte.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TextIO

from stabstudy import extras
from stabstudy.ingesting import several
from stabstudy.ingesting.choice import listed
from stabstudy.ingesting.points import LogError, Point, Raw, whole
from stabstudy.ingesting.series import settle
from stabstudy.wording import first_line

_GZIP = b"\x1f\x8b"


def open_log(path: Path) -> BinaryIO:
    """The bytes of a file, inflated where it is gzip, as far as it is whole."""
    f = path.open("rb")
    if f.peek(2)[:2] != _GZIP:
        return f
    with f:
        return io.BytesIO(_inflated(f.read()))


def log_suffix(path: Path) -> str:
    """The suffix in small letters, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def json_rows(path: Path, raw: Raw) -> Iterator[dict[str, Any]]:
    """Every line that is a JSON object. Raises LogError for a file without any."""
    good = bad = 0
    torn = False
    with open_log(path) as f:
        for line in f:
            if not line.strip(b" \t\r\n\0"):
                continue
            row = parse_line(line)
            torn = row is None
            if row is None:
                bad += 1
            else:
                good += 1
                yield flat(row)
    if not good:
        raise LogError("is empty" if not bad else "has no line that is a JSON object")
    if torn:
        raw.left_out["torn last line"] += 1
    if bad - torn:
        raw.lose("lines that are not JSON objects", bad - torn)


def line_keys(path: Path) -> list[str]:
    """Every key of the JSON objects in the first hundred lines."""
    keys: dict[str, None] = {}
    with open_log(path) as f:
        for _ in range(100):
            keys |= dict.fromkeys(flat(parse_line(f.readline(2**20)) or {}))
    return list(keys)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line; None for anything else."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs |= flat(value, f"{above}{key}.")
        else:
            pairs[f"{above}{key}"] = value
    return pairs


def _inflated(data: bytes) -> bytes:
    parts: list[bytes] = []
    while data[:2] == _GZIP:
        inflater = zlib.decompressobj(wbits=31)
        try:
            parts.append(inflater.decompress(data))
        except zlib.error:  # cut or damaged: what was inflated before is gone with it, so by small pieces
            parts.append(_piecewise(data))
            break
        data = inflater.unused_data
    return b"".join(parts)


def _piecewise(data: bytes) -> bytes:
    inflater, parts = zlib.decompressobj(wbits=31), []
    try:
        for at in range(0, len(data), 256):
            parts.append(inflater.decompress(data[at : at + 256]))
    except zlib.error:
        pass
    return b"".join(parts)


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_TEXT = (".csv", ".tsv")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*")


def read_table(paths: Sequence[Path], given: Mapping[str, str]) -> list[Raw]:
    """The runs in a table, or in the charts of the same runs. `given`: ours -> the table's column, by the user."""
    raw = Raw("table")
    for path in paths:
        raw.rows += _rows(path, raw)
    if not raw.rows:
        raise LogError(
            f"has no row with a step and a loss or gradient norm (columns: {listed(table_columns(paths[0]))})"
        )
    return several.runs(raw, given)


def table_columns(path: Path) -> list[str]:
    """The names of a table's columns, from its beginning. Raises LogError where it has none."""
    if log_suffix(path) == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    if log_suffix(path) in _TEXT:
        return _header(path)[0]
    if not (keys := line_keys(path)):
        raise LogError("is empty" if path.stat().st_size == 0 else "has no line that is a JSON object")
    return keys


def _rows(path: Path, raw: Raw) -> Iterator[Mapping[str, Any]]:
    suffix = log_suffix(path)
    if suffix == ".parquet":
        yield from map(flat, _parquet_rows(path))
    elif suffix in _TEXT:
        yield from _csv_rows(path, raw)
    elif suffix == ".json" and (objects := _listed(path)) is not None:
        yield from map(flat, objects)
    else:
        yield from json_rows(path, raw)


def _listed(path: Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON list; None for a file that is none."""
    with open_log(path) as f:
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
    with open_log(path) as f:
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
    return io.TextIOWrapper(open_log(path), encoding="utf-8-sig", errors="replace", newline="")


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is not a Parquet file ({first_line(error)})") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in _parquet(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"is a damaged Parquet file ({first_line(error)})") from error


def read_trainer(state: Path | None, log: Path | None, given: Mapping[str, str]) -> Raw:
    """The run. Without a readable trainer_state.json beside it a trainer_log.jsonl has no gradient norms."""
    if log is None:
        assert state is not None
        return read_state(state, given)
    raw = read_log(log, given)
    if state is not None:
        try:
            _join(raw, read_state(state, given))
        except LogError as error:
            raw.notes.append(f"{state.name} beside it {error}: no gradient norms")
    return raw


def read_state(path: Path, given: Mapping[str, str] = MappingProxyType({})) -> Raw:
    """log_history, without evaluation and summary rows. Bare NaN is taken; raises LogError for any other file."""
    body = _json(path)
    history = body.get("log_history")
    if not isinstance(history, list):
        raise LogError(f"has no log_history (it holds {', '.join(list(body)[:6]) or 'nothing'})")
    every = whole(body.get("logging_steps"))
    raw = Raw("trainer_state", steps_planned=whole(body.get("max_steps")) or None, log_every=every or None)
    raw.rows += [row for row in history if isinstance(row, dict)]
    if others := len(history) - len(raw.rows):
        raw.left_out["rows that are not objects"] += others
    several.one(raw, given)
    if raw.points and raw.points[-1].lr == 0:
        raw.notes.append("the last learning rate is 0: each row has that of the next step, as transformers 4.x logs")
    return raw


def read_log(path: Path, given: Mapping[str, str] = MappingProxyType({})) -> Raw:
    """Every line with a loss; LLaMA-Factory writes no gradient norm here."""
    raw = Raw("trainer_log")
    raw.rows += json_rows(path, raw)
    return several.one(raw, given)


def _join(raw: Raw, state: Raw) -> None:
    """Give the log's points the gradient norms of the state, and the steps that only the state has."""
    ours = {p.step: p for p in settle(raw)}
    theirs = {p.step: p for p in settle(state)}
    raw.points = list(ours.values())
    if _differ((ours[s].loss, theirs[s].loss) for s in ours.keys() & theirs.keys()):
        raw.notes.append(
            "the losses in trainer_state.json beside it differ: it is another run's, so there are no gradient norms"
        )
        return
    raw.points = [_united(ours.get(s), theirs.get(s)) for s in sorted(ours.keys() | theirs.keys())]
    raw.left_out.update({k: n for k, n in state.left_out.items() if k not in raw.left_out})
    raw.notes += [note for note in state.notes if note not in raw.notes]
    raw.lost += state.lost
    raw.steps_planned = raw.steps_planned or state.steps_planned
    raw.log_every = state.log_every


def _united(log: Point | None, state: Point | None) -> Point:
    if log is None or state is None:
        return next(p for p in (state, log) if p is not None)
    # the state's loss: it knows what the NaN filter hid
    loss = log.loss if state.loss is None else state.loss
    return Point(log.step, loss, state.grad_norm, state.lr if log.lr is None else log.lr)


def _differ(pairs: Iterable[tuple[float | None, float | None]]) -> bool:
    """Whether most of the losses that both have disagree by more than rounding."""
    both = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    return 2 * sum(not math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in both) > len(both)


def _json(path: Path) -> dict[str, Any]:
    try:
        with open_log(path) as f:
            text = f.read().decode("utf-8-sig")
        body = json.loads(text)
    except UnicodeDecodeError as error:
        raise LogError(f"is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise LogError(f"is not JSON ({error if text.strip() else 'empty'})") from error
    if not isinstance(body, dict):
        raise LogError("must hold a JSON object")
    return body


LINGUA_NAMES = {"step": "global_step", "loss": "loss/out", "grad_norm": "optim/grad_norm", "lr": "optim/lr"}
NO_STEP = -1.0
"""The gradient norm on a line of a micro-batch after which the optimizer took no step."""


def read_lingua(path: Path) -> Raw:
    """Every line on which the optimizer took a step."""
    raw = Raw("lingua")
    for row in json_rows(path, raw):
        if row.get(LINGUA_NAMES["grad_norm"]) == NO_STEP:
            raw.left_out["micro-batches without a step (norm -1)"] += 1
        else:
            raw.rows.append(row)
    return several.one(raw, LINGUA_NAMES)


EVENTS_PREFIX = "events.out.tfevents."
STEP = "step"


class ReaderMissingError(LogError):
    """TensorBoard is not installed."""


def read_events(paths: Sequence[Path], given: Mapping[str, str]) -> Raw:
    """The scalars of one run, whose files continue each other, a row per step. `given`: ours -> the tag."""
    raw = Raw("tensorboard")
    rows: list[dict[str, Any]] = []
    for path in paths:
        for step, tag, value in _scalars(path):
            if not rows or rows[-1][STEP] != step or tag in rows[-1]:
                rows.append({STEP: step})
            rows[-1][tag] = value
    if not rows:
        raise LogError("holds no scalar")
    raw.rows += rows
    return several.one(raw, {**given, "step": STEP})


def _scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) in the order of the file, up to where it is torn."""
    try:
        # beside TensorFlow the package logs to the terminal when it is imported
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ReaderMissingError(f"needs TensorBoard's reader: {extras.install(['tensorboard'])}") from error
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            with contextlib.suppress(ValueError, TypeError):  # text, images
                number = tensor_util.make_ndarray(value.tensor)
                if number.ndim == 0 and number.dtype.kind in "fiu":
                    yield int(event.step), value.tag, float(number)
