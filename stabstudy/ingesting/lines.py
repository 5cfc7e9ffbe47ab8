"""JSON lines of any origin: whole good lines are kept, others counted; nested keys become dotted ones."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from stabstudy.ingesting.points import LogError, Raw

_GZIP = b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, inflated where it is gzip, as far as it is whole."""
    f = path.open("rb")
    if f.peek(2)[:2] != _GZIP:
        return f
    with f:
        return io.BytesIO(_inflated(f.read()))


def suffix(path: Path) -> str:
    """The suffix in small letters, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def rows(path: Path, raw: Raw) -> Iterator[dict[str, Any]]:
    """Every line that is a JSON object. Raises LogError for a file without any."""
    good = bad = 0
    torn = False
    with opened(path) as f:
        for line in f:
            if not line.strip(b" \t\r\n\0"):
                continue
            row = parse(line)
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


def keys(path: Path) -> list[str]:
    """Every key of the JSON objects in the first hundred lines."""
    found: dict[str, None] = {}
    with opened(path) as f:
        for _ in range(100):
            found |= dict.fromkeys(flat(parse(f.readline(2**20)) or {}))
    return list(found)


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line; None for anything else."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


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
