"""The files of a source, and the digest of their content, independent of their location."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from stabstudy.config import DataConfig
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError, first_line

PATTERNS = {
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.jsonl.zstd"),
    "parquet": ("*.parquet",),
    "lingua": ("*.chunk.*.jsonl",),
}
"""What a source reads of a folder, sub-folders included. A single file may have any name (not for lingua)."""

VALIDATION = "*.val.jsonl"  # Lingua's held-out lines; stabstudy holds out windows of its own

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
    if root.is_file() and config.source != "lingua":
        return [DataFile(root.name, root, root.stat().st_size)]
    if not root.is_dir():
        kind = "a folder" if config.source == "lingua" else "a regular file or a folder"
        raise DataError("data.path", f"source {config.source} needs {kind}", str(root))
    patterns = PATTERNS[config.source]
    found = walk(root, lambda name: any(fnmatch(name, p) for p in patterns) and not fnmatch(name, VALIDATION))
    if not found:
        raise DataError("data.path", f"the folder holds no {' or '.join(patterns)}", str(root))
    return found


def existing(path: str) -> Path:
    """The path, ~ expanded. Raises DataError if nothing is there."""
    try:
        root = Path(path).expanduser()
        root.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError("data.path", f"must exist and be readable ({_reason(error)})", repr(path)) from error
    return root


def walk(root: Path, wanted: Callable[[str], bool]) -> list[DataFile]:
    """The regular files below `root` whose own name is `wanted`, sorted by name; hidden ones (.name) are passed over.

    Links to folders are not entered. Raises DataError where a link to a folder or to a wanted file leaves `root`.
    """
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders + [name for name in names if wanted(name) and not name.startswith(".")]:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
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
