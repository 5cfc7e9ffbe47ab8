"""Readers of files: their documents, row by row, and what happens to a row that cannot be read.

Nothing is guessed and nothing is dropped silently: an unusable row is an error with file and line, or is counted
where `data.bad_rows` allows some; a file that ends too early is always an error. Every reader is a stream: memory holds
a document (of Parquet, a row group's text), never a file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from stabstudy.config import DataConfig
from stabstudy.data.files import DataFile, cause
from stabstudy.settings import DataError
from stabstudy.wording import first_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

LINGUA_KEYS = ("text", "content")
ARRAY = "a JSON array is not a JSON lines file, which has one object with its text on each line"
CHAT = "chat data are read by objective=sft data=sft data.path=..."
LABELLED = (
    "completions with labels are read by objective=kto data=kto data.path=..., without them by objective=sft data=sft"
)
PAIRS = "pairs are read by objective=kto data=kto data.path=..."
CHAT_KEYS = {"completion", "messages", "conversations"}
LABEL_KEYS, PAIR_KEYS = {"label", "kto_tag"}, {"chosen", "rejected"}
CONVERT = "write its objects one to a line (jq -c '.[]')"
DOCUMENT = "one JSON document over several lines is not a JSON lines file, which has one object on each line"
BLOCK = 1 << 18  # bytes read at once
BOM = b"\xef\xbb\xbf"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how compressed files begin, whatever they are called


@dataclass
class RowCount:
    """How many rows were read and how many of them were unusable; `share` of them may be."""

    share: float
    rows: int = 0
    skipped: int = 0
    first: str = ""  # where and why, of the first row skipped

    def skip(self, where: str, reason: str) -> None:
        """Count the row just read as unusable. Raises DataError at once where none may be."""
        if self.share == 0:
            raise DataError("data.path", f"{where}: {reason}")
        self.skipped += 1
        self.first = self.first or f"{where}: {reason}"

    def finish(self) -> None:
        """Raises DataError when more rows were unusable than the share of all the rows read."""
        if self.skipped > self.share * self.rows:
            rule = f"at most a share of {self.share:g} of the rows may be unreadable; the first: {self.first}"
            raise DataError("data.bad_rows", rule, f"{self.skipped} of {self.rows}")


def texts(config: DataConfig, file: DataFile, count: RowCount) -> Iterator[str]:
    """The documents of one file in order. Raises DataError with file and line (row, byte)."""
    try:
        if config.source == "text":
            yield _whole_file(file)
        elif config.source == "parquet":
            yield from _parquet_rows(file, config.text_column, count)
        else:
            yield from _json_rows(file, LINGUA_KEYS if config.source == "lingua" else (config.text_column,), count)
    except OSError as error:
        raise DataError("data.path", f"{file.path}: cannot be read: {cause(error)}") from error


def text_or_reason(row: Any, keys: tuple[str, ...]) -> tuple[str, str]:
    """The text under the first of `keys` that the row has, and ''; or '' and why there is no usable text."""
    names = " or ".join(map(repr, keys))
    if not isinstance(row, dict):
        return "", f"must be an object with {names}, is {type(row).__name__}"
    key = next((key for key in keys if key in row), None)
    if key is None:
        reader = f" ({line})" if (line := _reader(set(row))) else ""
        return "", f"has no {names}, only {', '.join(map(repr, list(row)[:8])) or 'nothing'}{reader}"
    if not isinstance(row[key], str):
        return "", f"{key!r} must be text, is {'null' if row[key] is None else type(row[key]).__name__}"
    try:
        row[key].encode()
    except UnicodeEncodeError:
        return "", f"{key!r} holds half a surrogate pair, which UTF-8 cannot encode"
    return row[key], ""


def _reader(keys: set[str]) -> str:
    """Which objective reads rows with these keys; "" where none does."""
    if keys >= PAIR_KEYS:
        return PAIRS
    if keys.isdisjoint(CHAT_KEYS):
        return ""
    return CHAT if keys.isdisjoint(LABEL_KEYS) else LABELLED


def check_parquet(file: DataFile, column: str) -> None:
    """Raises DataError if the file has no footer (is cut) or no text column of that name."""
    _open_parquet(file, column).close()


def _whole_file(file: DataFile) -> str:
    try:
        with file.path.open("rb") as f:
            return b"".join(unpacked(f, file)).removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise DataError("data.path", f"{file.path}: must be UTF-8, is not at byte {error.start}") from error


def _json_rows(file: DataFile, keys: tuple[str, ...], count: RowCount) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue  # Lingua's tools leave blank lines where they joined files
        count.rows += 1
        try:
            text, reason = text_or_reason(json.loads(line.decode()), keys)
        except (ValueError, RecursionError) as error:
            text, reason = "", f"must be one JSON object per line ({first_line(error)})"
        if reason and number == 1:
            reason = _not_lines(file, line.strip(), keys) or reason
        if reason:
            count.skip(f"{file.path}:{number}", reason)
        else:
            yield text


def _not_lines(file: DataFile, first: bytes, keys: tuple[str, ...]) -> str:
    """Why a file whose first line has no text is no JSON lines file at all; "" where it is one."""
    if first.startswith(b"["):
        with file.path.open("rb") as f:
            beginning = next(unpacked(f, file), b"")
        texts = any(f'"{key}"'.encode() in beginning for key in keys)
        known = {key for key in CHAT_KEYS | LABEL_KEYS | PAIR_KEYS if f'"{key}"'.encode() in beginning}
        return f"{ARRAY}; {CONVERT if texts else _reader(known) or CHAT}"
    return DOCUMENT if first == b"{" else ""


def lines(file: DataFile) -> Iterator[bytes]:
    """The lines of a plain, gzip or zstd file, without line ends and (files get joined) byte-order marks."""
    parts: list[bytes] = []  # of the line that has not ended yet
    with file.path.open("rb") as f:
        for block in unpacked(f, file):
            head, *lines = block.split(b"\n")
            parts.append(head)
            for line in lines:
                yield b"".join(parts).removeprefix(BOM)
                parts = [line]
    yield b"".join(parts).removeprefix(BOM)


def unpacked(f: BinaryIO, file: DataFile) -> Iterator[bytes]:
    """The content of a plain, gzip or zstd file in blocks. Raises DataError where it is damaged."""
    name, magic = file.name.lower(), f.read(4)
    f.seek(0)
    try:
        if name.endswith((".zst", ".zstd")) or magic == ZSTD:
            yield from _zstd_frames(f)
        else:
            plain = gzip.GzipFile(fileobj=f) if name.endswith(".gz") or magic.startswith(GZIP) else f
            while block := plain.read(BLOCK):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{file.path}: damaged within its first {f.tell()} of {file.size} bytes"
        raise DataError("data.path", f"{where}: {first_line(error)}") from error


def _zstd_frames(f: BinaryIO) -> Iterator[bytes]:
    """Every frame, one after the other. By hand: python-zstandard's reader across frames takes a cut file for whole."""
    import zstandard

    frame = None
    while block := f.read(BLOCK):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(first_line(error)) from error
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the file ends inside a compressed frame")


def _parquet_rows(file: DataFile, column: str, count: RowCount) -> Iterator[str]:
    import pyarrow as pa

    number = 0
    with _open_parquet(file, column) as table:
        try:
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for raw in batch.column(0).cast(pa.string()).cast(pa.binary()).to_pylist():
                    number += 1
                    text, reason = _text_of_bytes(raw)
                    count.rows += 1
                    if reason:
                        count.skip(f"{file.path}: row {number}", f"{column!r} {reason}")
                    else:
                        yield text
        except (pa.ArrowException, OSError) as error:
            where = f"{file.path}: damaged after row {number} (file of {file.size} bytes)"
            raise DataError("data.path", f"{where}: {first_line(error)}") from error


def _text_of_bytes(raw: bytes | None) -> tuple[str, str]:
    """The text and ''; or '' and why it is unusable."""
    if raw is None:
        return "", "must be text, is null"
    try:
        return raw.decode(), ""
    except UnicodeDecodeError as error:
        return "", f"must be UTF-8, is not at byte {error.start}"


def _open_parquet(file: DataFile, column: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        where = f"{file.path}: truncated, or not a Parquet file ({file.size} bytes)"
        raise DataError("data.path", f"{where}: {first_line(error)}") from error
    names = table.schema_arrow.names
    if column not in names:
        raise DataError("data.text_column", f"{file.path} has only the columns {', '.join(names)}", column)
    kind = table.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError("data.text_column", f"must be a text column, in {file.path} it is {kind}", column)
    return table
