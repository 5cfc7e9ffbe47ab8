"""The token cache: a corpus tokenized once, then mapped from disk by every trial of every study in milliseconds.

    <cache>/tokens/<key>/tokens.bin         token ids, little endian, uint16 (vocabularies up to 65,536) or uint32
    <cache>/tokens/<key>/docs.bin           where each document ends, in tokens, uint64
    <cache>/tokens/<key>/meta.json          counts, dtype, sha256 of both files, fingerprint, tokenizer
    <cache>/tokens/<key>/unigram-*.json     unigram entropy of a training part, see `unigram`
    <cache>/tokens/<key>.lock               held by the process that builds
    <cache>/files/                          memory of large files, see `edits`

The key is the data fingerprint, so a cache is never out of date, only unused. It is built in a temporary folder, synced
and renamed, under a lock: of many trials that start at once one builds and the others wait. Sizes and checksums are
verified when a process opens it first; a damaged cache is built again. Deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import locks
from stabstudy.config import DataConfig
from stabstudy.data import building, sources
from stabstudy.data.building import FORMAT, Meta
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError
from stabstudy.data.progress import Say


@dataclass(frozen=True)
class Corpus:
    """A tokenized source: arrays mapped from disk, read only."""

    tokens: NDArray[np.unsignedinteger[Any]]  # [n] every document behind the other, bos and eos included
    doc_ends: NDArray[np.uint64]  # [documents] position behind each document's last token
    vocab_size: int
    fingerprint: str  # of the data: source and tokenizer
    folder: Path

    def document_of(self, position: int) -> int:
        """The number, from 0, of the document that the token at `position` belongs to."""
        return int(np.searchsorted(self.doc_ends, position, side="right"))


class _Damaged(Exception):
    """A cache that differs from its meta.json, or has none."""


def prepare(config: DataConfig, cache_dir: Path, say: Say = lambda line: None, expected: str | None = None) -> Corpus:
    """The corpus of these settings, from the cache or built into it now.

    Safe to call from any number of processes at once. `say` receives a line for each thing that takes time or should
    be known: building, waiting for another process, rows skipped, a damaged cache, data pinned by nothing. Raises
    DataError for data that cannot be read, and for data that have not the `expected` fingerprint.
    """
    memory = Memory(cache_dir, learn=True, say=say)
    fingerprint = sources.fingerprint(config, memory)
    if expected not in (None, fingerprint):
        raise DataError("data", f"must still be what the study began with (fingerprint {expected})", fingerprint)
    folder = _folder(cache_dir, fingerprint)
    with contextlib.suppress(_Damaged):
        return _open(folder, fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder, say):
        try:
            return _open(folder, fingerprint)
        except _Damaged as error:
            if folder.exists():
                say(f"data: the token cache {folder} is damaged ({error}) and is built again")
        building.build(config, folder, fingerprint, memory)
        return _open(folder, fingerprint)


def count(fingerprint: str, cache_dir: Path) -> int | None:
    """Tokens of the corpus of this fingerprint, from its meta.json; None where it is not in the cache."""
    try:
        meta = _read_meta(_folder(cache_dir, fingerprint) / "meta.json")
    except _Damaged:
        return None
    return meta.tokens if meta.format == FORMAT and meta.fingerprint == fingerprint else None


def _folder(cache_dir: Path, fingerprint: str) -> Path:
    return cache_dir / "tokens" / hashlib.sha256(f"{FORMAT} {fingerprint}".encode()).hexdigest()[:16]


def default_cache_dir() -> Path:
    """$STABSTUDY_CACHE, else $XDG_CACHE_HOME/stabstudy, else ~/.cache/stabstudy, else a folder for temporary files.

    The last where no home can be written. Raises DataError if $STABSTUDY_CACHE is set and cannot be written.
    """
    if asked := os.environ.get("STABSTUDY_CACHE"):
        if not _writable(Path(asked)):
            raise DataError("$STABSTUDY_CACHE", "must be a folder that can be written", repr(asked))
        return Path(asked)
    usual, shared = _usual_folders()
    if usual.is_absolute() and _writable(usual):
        return usual
    if _writable(shared) and _is_ours(shared):
        return shared
    return Path(tempfile.mkdtemp(prefix="stabstudy-"))  # somebody else's folder of that name


def named_cache_dir(path: str) -> Path:
    """The folder of `compute.cache_dir`, made where it is missing. Raises OSError where it cannot be written."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", path)
    return folder


def existing_cache_dir() -> Path | None:
    """The folder of `default_cache_dir`, where it is there already. Creates nothing."""
    if asked := os.environ.get("STABSTUDY_CACHE"):
        return Path(asked) if Path(asked).is_dir() else None
    usual, shared = _usual_folders()
    if usual.is_absolute() and os.access(usual, os.W_OK | os.X_OK):
        return usual
    return shared if shared.is_dir() and _is_ours(shared) else None


def _usual_folders() -> tuple[Path, Path]:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "stabstudy"), Path(tempfile.gettempdir(), f"stabstudy-{os.getuid()}")


def _is_ours(folder: Path) -> bool:
    """Whether only this user can put tokens there."""
    return folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022


_verified: set[tuple[Path, int]] = (
    set()
)  # meta.json files, by time of change, whose checksums this process has seen right


def _open(folder: Path, fingerprint: str) -> Corpus:
    """Raises _Damaged."""
    meta = _read_meta(folder / "meta.json")
    if meta.format != FORMAT or meta.fingerprint != fingerprint or meta.dtype not in ("<u2", "<u4"):
        raise _Damaged("meta.json is of other data")
    tokens = _map(folder / "tokens.bin", meta.dtype, meta.tokens)
    doc_ends = _map(folder / "docs.bin", "<u8", meta.documents)
    seen = folder, (folder / "meta.json").stat().st_mtime_ns
    if seen not in _verified:
        for array, sha256 in ((tokens, meta.tokens_sha256), (doc_ends, meta.docs_sha256)):
            if hashlib.sha256(array.data).hexdigest() != sha256:
                raise _Damaged("wrong checksum")
        _verified.add(seen)
    return Corpus(tokens, doc_ends, meta.vocab_size, fingerprint, folder)


def _read_meta(path: Path) -> Meta:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Meta(**body)
    except (OSError, ValueError, TypeError) as error:
        raise _Damaged("meta.json cannot be read") from error


def _map(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """Raises _Damaged when the file is missing or of another size."""
    try:
        size = path.stat().st_size
        if size != count * np.dtype(dtype).itemsize:
            raise _Damaged(f"{path.name} has {size} bytes")
        return np.memmap(path, dtype, mode="r").view(np.ndarray)  # still mapped; indexing it costs less
    except (OSError, ValueError) as error:
        raise _Damaged(f"{path.name} cannot be read") from error


def lock(folder: Path, say: Say = lambda line: None) -> contextlib.AbstractContextManager[None]:
    """Hold the lock file beside a corpus; wait for it, with a line."""
    waiting = "data: another process is preparing this data; waiting for it"
    return locks.lock_file(folder.with_suffix(".lock"), lambda: say(waiting))


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
