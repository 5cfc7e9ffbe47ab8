"""Edits of large files, found although a fingerprint reads only samples of such a file.

A file of more than 64 MB is fingerprinted by 16 blocks (`files.digest`), which an edit of the same size between the
blocks does not touch. So the first launch that reads a file also hashes the whole of it, and the cache folder remembers

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabstudy import store
from stabstudy.data.progress import Progress, Say

BLOCK = 1 << 20  # bytes hashed at once


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
