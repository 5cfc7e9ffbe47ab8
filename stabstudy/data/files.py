"""Files of a data source and the location-independent digest of their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from stabstudy.config import DataConfig
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError
from stabstudy.wording import first_line

_PACKED = ("", ".gz", ".zst", ".zstd")
PATTERNS = {
    "text": ("*.txt",),
    "jsonl": (
        *(f"*.{kind}{end}" for kind in ("jsonl", "ndjson") for end in _PACKED),
        *(f"*.json{e}" for e in _PACKED[1:]),
    ),
    "parquet": ("*.parquet", "*.parq", "*.pq"),
    "lingua": ("*.chunk.*.jsonl",),
}
"""What a source reads of a folder, sub-folders included, in capitals too; `data.files` names others. A plain *.json is
read as JSON lines (its first line is an object) where a folder has nothing else: beside other names it tells about the
data. A single file may have any name (not for lingua)."""
LINES = "*.json"
NAMES = {kind: " or ".join(patterns) for kind, patterns in PATTERNS.items()} | {
    "jsonl": "*.jsonl, *.ndjson or *.json of one object per line (also .gz, .zst, .zstd)"
}

VALIDATION = "*.val.jsonl"  # Lingua's held-out lines; stabstudy holds out windows of its own

LONGEST = 16 << 20  # bytes of a first line that are looked at

WHOLE = 64 << 20  # bytes; files up to this size are hashed whole, larger ones by samples ...
MANY = 1 << 30  # ... and when all files together exceed this, every file larger than its samples is
SAMPLES, SAMPLE = 16, 64 << 10  # number and size of the blocks, evenly spread from the first byte to the last


@dataclass(frozen=True)
class DataFile:
    """One file of a source; `name` is relative to the source's folder, with slashes."""

    name: str
    path: Path
    size: int


def find(config: DataConfig) -> list[DataFile]:
    """The files of a source of kind text, jsonl, parquet or lingua, by name. Raises DataError if there are none."""
    root = existing(config.path or "")
    if root.is_file() and config.files is not None:
        raise DataError(
            "data.files", "chooses among the files of a folder, and data.path is a file", repr(config.files)
        )
    if root.is_file() and config.source != "lingua":
        return [DataFile(root.name, root, root.stat().st_size)]
    if not root.is_dir():
        kind = "a folder" if config.source == "lingua" else "a regular file or a folder"
        raise DataError("data.path", f"source {config.source} needs {kind}", str(root))
    if config.files is not None:
        glob = _glob(config.files)
        found = walk(root, lambda path: glob.fullmatch(path) is not None)
    else:
        found = walk(root, lambda path: _is_named(path, PATTERNS[config.source]))
        if not found and config.source == "jsonl":
            found = _lines(walk(root, lambda path: _is_named(path, (LINES,))))
    if not found:
        name = NAMES[config.source] if config.files is None else f"file {config.files}"
        rule = f"the folder holds no {name}; it holds {_contents(root)}"
        hint = " (data.files names what to read)" if config.files is None and config.source != "lingua" else ""
        raise DataError("data.path", rule + hint, str(root))
    return found


def _is_named(path: str, patterns: tuple[str, ...]) -> bool:
    name = path.rpartition("/")[2].lower()
    return any(fnmatch(name, pattern) for pattern in patterns) and not fnmatch(name, VALIDATION)


def _glob(pattern: str) -> re.Pattern[str]:
    """Relative paths with slashes that a glob takes: without a slash in it, a file's own name in any folder."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern.removeprefix("./"))
    text = "".join(pieces.get(p) or (p.replace("[!", "[^") if p[:1] == "[" and p[1:] else re.escape(p)) for p in parts)
    return re.compile(text if "/" in pattern.removeprefix("./") else f"(?:.*/)?{text}", re.IGNORECASE)


def _lines(candidates: list[DataFile]) -> list[DataFile]:
    """The files, if each begins with a line that is an object. Raises DataError naming one that does not."""
    for file in candidates:
        try:
            with file.path.open("rb") as f:
                line = f.readline(LONGEST).lstrip(b"\xef\xbb\xbf \t\r\n") or f.readline(LONGEST).lstrip()
        except OSError as error:
            raise DataError("data.path", f"must be readable ({_reason(error)})", str(file.path)) from error
        if not line.startswith(b"{") or (len(line) < LONGEST and not _is_json(line)):
            kind = "is a JSON array" if line.startswith(b"[") else "does not begin with a line that is a JSON object"
            rule = f"{file.path} {kind}: JSON lines have one object on each line; data.files names those to read"
            raise DataError("data.path", rule)
    return candidates


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix.lower() in _PACKED[1:] else path.suffix


def _contents(root: Path) -> str:
    """What a folder holds, by the ends of the names, the most frequent first."""
    files = (Path(name) for _, _, names in os.walk(root) for name in names)
    ends = Counter(_ending(path) or "without an ending" for path in files)
    shown = [f"{n} *{end}" if end[0] == "." else f"{n} {end}" for end, n in ends.most_common(4)]
    return ", ".join(shown) + (" and others" if len(ends) > 4 else "") or "nothing"


def existing(path: str) -> Path:
    """The path, ~ expanded. Raises DataError if nothing is there."""
    try:
        root = Path(path).expanduser()
        root.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError("data.path", f"must exist and be readable ({_reason(error)})", repr(path)) from error
    return root


def walk(root: Path, wanted: Callable[[str], bool]) -> list[DataFile]:
    """The regular files below `root` whose path in it is `wanted`, by name; hidden ones (.name) are passed over.

    Links to folders are not entered. Raises DataError where a link to a folder or to a wanted file leaves `root`.
    """
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        within = Path(folder).relative_to(root)
        chosen = [n for n in names if not n.startswith(".") and wanted((within / n).as_posix())]
        for name in subfolders + chosen:
            path = Path(folder, name)
            relative = (within / name).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise DataError("data.path", f"a link must not lead out of the folder {root}", relative)
            info = existing(str(path)).stat()
            if stat.S_ISREG(info.st_mode):
                found.append(DataFile(relative, path, info.st_size))
    return sorted(found, key=lambda file: file.name)


def digest(files: list[DataFile], memory: Memory | None = None, partly: bool = False) -> str:
    """sha256 of the files' names, sizes and content; in a large file 16 evenly spread blocks stand for its content.

    An edit between the blocks is seen with a `memory` (see `edits`). `partly`: perhaps not all of the files is read, so
    that they are remembered only if they are small together.
    """
    size = sum(file.size for file in files)
    whole = WHOLE if size <= MANY else SAMPLES * SAMPLE
    if memory is not None and partly and size > MANY:
        memory = replace(memory, learn=False)
    total = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        try:
            with file.path.open("rb") as f:
                for start, length in _stretches(file.size, whole):
                    f.seek(start)
                    content.update(f.read(length))
            name = content.hexdigest()
            if memory is not None and file.size > whole:
                name = memory.content(name, file.path)
        except OSError as error:
            raise DataError("data.path", f"must be readable ({_reason(error)})", str(file.path)) from error
        total.update(json.dumps([file.name, file.size, name]).encode())
    return total.hexdigest()


def _stretches(size: int, whole: int) -> Iterator[tuple[int, int]]:
    """(start, size) of each stretch that is hashed of a file of `size` bytes."""
    if size <= whole:
        yield from ((start, SAMPLE) for start in range(0, size, SAMPLE))
    else:
        yield from ((i * (size - SAMPLE) // (SAMPLES - 1), SAMPLE) for i in range(SAMPLES))


def _refuse(error: OSError) -> NoReturn:
    raise DataError("data.path", f"must be readable ({_reason(error)})", str(error.filename)) from error


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
