"""Files of a data source, and the digest of their content.

A file of more than 64 MB is fingerprinted by 16 blocks (`digest`), which an edit of the same size between the blocks
does not touch. So the first launch that reads a file also hashes the whole of it, and the cache folder (`Memory`) keeps

    <cache>/files/<digest of the samples>-<size>.json    {"first": sha256, "seen": {path: [size, mtime_ns, sha256]}}

`first` is the whole of the first file that had these samples, `seen` what lay where, and its time of change. A file
whose size and time are those seen is not read again. One whose time is new is hashed whole: equal to `first`, its
samples alone stand for it, as they do without any memory, so no fingerprint of an unchanged file ever differs from what
it always was; else the whole stands for it, and the fingerprint is another one. An edit taken back restores the first.

What it cannot see: an edit that keeps the time of change (cp -p, touch -r); one from before the first launch that
remembered the file; one in files of together more than 1 GB of which data.max_bytes reads a part, because hashing them
would take longer than reading that part. What comes first depends on the cache: where it was deleted, or on another
machine, an edited file counts as the first. A study that was begun with another one is then refused, never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from stabstudy import store
from stabstudy.config import DataConfig
from stabstudy.settings import DataError
from stabstudy.wording import first_line

Say = Callable[[str], None]

EVERY = 5.0  # seconds between lines, and before the first
clock = time.monotonic

BLOCK = 1 << 20  # bytes hashed at once

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
INFO = "dataset_info.json"  # tells about the examples beside it, see `chats`
PATTERNS["examples"] = (*PATTERNS["jsonl"], LINES, *PATTERNS["parquet"])
NAMES = {kind: " or ".join(patterns) for kind, patterns in PATTERNS.items()} | {
    "jsonl": "*.jsonl, *.ndjson or *.json of one object per line (also .gz, .zst, .zstd)",
    "examples": "*.json, *.jsonl, *.ndjson (also .gz, .zst, .zstd) or *.parquet",
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
    """The files of a source that has a path and is not the hub, by name. Raises DataError if there are none."""
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
        files = walk(root, lambda path: glob.fullmatch(path) is not None)
    else:
        files = walk(root, lambda path: _is_named(path, PATTERNS[config.source]))
        if not files and config.source == "jsonl":
            files = _lines(walk(root, lambda path: _is_named(path, (LINES,))))
    if config.source == "examples":
        files = [file for file in files if file.path.name != INFO]
    if not files:
        name = NAMES[config.source] if config.files is None else f"file {config.files}"
        rule = f"the folder holds no {name}; it holds {_contents(root)}"
        hint = " (data.files names what to read)" if config.files is None and config.source != "lingua" else ""
        raise DataError("data.path", rule + hint, str(root))
    return files


def existing(path: str) -> Path:
    """The path, ~ expanded. Raises DataError if nothing is there."""
    try:
        root = Path(path).expanduser()
        root.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError("data.path", f"must exist and be readable ({cause(error)})", repr(path)) from error
    return root


def walk(root: Path, wanted: Callable[[str], bool]) -> list[DataFile]:
    """The regular files below `root` whose path in it is `wanted`, by name; hidden ones (.name) are passed over.

    Links to folders are not entered. Raises DataError where a link to a folder or to a wanted file leaves `root`.
    """
    files = []
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
                files.append(DataFile(relative, path, info.st_size))
    return sorted(files, key=lambda file: file.name)


def digest(files: list[DataFile], memory: Memory | None = None, partly: bool = False) -> str:
    """sha256 of the files' names, sizes and content; in a large file 16 evenly spread blocks stand for its content.

    An edit between the blocks is seen with a `memory`. `partly`: perhaps not all of the files is read, so
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
            raise DataError("data.path", f"must be readable ({cause(error)})", str(file.path)) from error
        total.update(json.dumps([file.name, file.size, name]).encode())
    return total.hexdigest()


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
            raise DataError("data.path", f"must be readable ({cause(error)})", str(file.path)) from error
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


def _stretches(size: int, whole: int) -> Iterator[tuple[int, int]]:
    """(start, size) of each stretch that is hashed of a file of `size` bytes."""
    if size <= whole:
        yield from ((start, SAMPLE) for start in range(0, size, SAMPLE))
    else:
        yield from ((i * (size - SAMPLE) // (SAMPLES - 1), SAMPLE) for i in range(SAMPLES))


def _refuse(error: OSError) -> NoReturn:
    raise DataError("data.path", f"must be readable ({cause(error)})", str(error.filename)) from error


def cause(error: BaseException) -> str:
    """Why something could not be read, in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


@dataclass(frozen=True)
class Memory:
    """A cache folder as a memory of files. `learn`: also remember a file that was never seen before."""

    cache_dir: Path
    learn: bool = False
    say: Say = lambda line: None

    def content(self, samples: str, path: Path) -> str:
        """What stands for the content of the file in a fingerprint: the digest of its samples, unless it was edited.

        Raises OSError where the file cannot be read. A memory that cannot be read or written is none.
        """
        info = path.stat()
        file = self.cache_dir / "files" / f"{samples[:32]}-{info.st_size}.json"
        first, seen = _read(file)
        if first is None and not self.learn:
            return samples
        place, stamp = str(path.resolve()), [info.st_size, info.st_mtime_ns]
        entry = seen.get(place)
        if first is not None and entry is not None and entry[:2] == stamp:
            whole: str = entry[2]
        else:
            whole = self._sha256(path)
            first = whole if first is None else first
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                store.write_json(file, {"first": first, "seen": seen | {place: [*stamp, whole]}})
        return samples if whole == first else hashlib.sha256(f"{samples} {whole}".encode()).hexdigest()

    def _sha256(self, path: Path) -> str:
        digest, done, progress = hashlib.sha256(), 0, Progress(self.say, "MB")
        with path.open("rb") as f:
            while block := f.read(BLOCK):
                digest.update(block)
                done += len(block)
                progress.update(f"hashing {path.name}, once, to know later edits of it", done / 1e6)
        return digest.hexdigest()


def _read(file: Path) -> tuple[str | None, dict[str, list[Any]]]:
    """(first, seen) of the file; (None, {}) where it is missing or damaged."""
    try:
        body = store.read_json(file)
    except store.StoreError:
        return None, {}
    first, seen = body.get("first"), body.get("seen")
    if not isinstance(first, str) or not isinstance(seen, dict):
        return None, {}
    return first, {place: entry for place, entry in seen.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [int, int, str]


class Progress:
    """A line to `say`, at most every 5 seconds: how much is done and how fast; shorter work has none."""

    def __init__(self, say: Say, unit: str):
        self.say, self.unit = say, unit
        self.start = clock()
        self.next = self.start + EVERY

    def update(self, work: str, done: float) -> None:
        """`done`, in units, of this work; called as often as convenient."""
        now = clock()
        if now >= self.next:
            seconds = now - self.start
            amount = f"{done:,.1f} {self.unit} in {seconds:.0f} s, {done / seconds:.3g} a second"
            self.say(f"data: {work}: {amount}")
            self.next = now + EVERY
