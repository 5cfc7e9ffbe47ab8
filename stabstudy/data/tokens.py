"""The token cache: a corpus tokenized once, then mapped from disk by every trial of every study in milliseconds.

    <cache>/tokens/<key>/tokens.bin         token ids, little endian, uint16 (vocabularies up to 65,536) or uint32
    <cache>/tokens/<key>/docs.bin           where each document ends, in tokens, uint64
    <cache>/tokens/<key>/mask.bin           of examples alone: 1 for a token of a completion, else 0, uint8
    <cache>/tokens/<key>/labels.bin         of labelled examples alone: 1 for one whose completion is wanted, uint8
    <cache>/tokens/<key>/meta.json          counts, dtype, sha256 of these files, fingerprint, tokenizer
    <cache>/tokens/<key>/unigram-*.json     unigram entropy of a training part, see `batches`
    <cache>/tokens/<key>.lock               held by the process that builds
    <cache>/files/                          memory of large files, see `files`

The key is the data fingerprint, so a cache is never out of date, only unused. It is built in a temporary folder, synced
and renamed, under a lock: of many trials that start at once one builds and the others wait. Documents pass through in
lists of about a million characters, so memory holds such a list (or the largest document), whatever the size of the
corpus. Sizes and checksums are verified when a process opens the cache first; a damaged one is built again. Deleting
the folder is always safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stabstudy import disk, store
from stabstudy.config import EXAMPLES, HUB, DataConfig
from stabstudy.data import sources, tokenizer
from stabstudy.data.chats import Plain
from stabstudy.data.examples import Example
from stabstudy.data.files import Memory, Progress, Say
from stabstudy.data.rows import RowCount
from stabstudy.data.tokenizer import Ids, Tokenizer
from stabstudy.settings import DataError

FORMAT = 1

BATCH = 1 << 20  # characters tokenized at once


@dataclass(frozen=True)
class Corpus:
    """A tokenized source: arrays mapped from disk, read only."""

    tokens: NDArray[np.unsignedinteger[Any]]  # [n] every document behind the other, bos and eos included
    doc_ends: NDArray[np.uint64]  # [documents] position behind each document's last token
    vocab_size: int
    fingerprint: str  # of the data: source and tokenizer
    folder: Path
    mask: NDArray[np.uint8] | None = None  # [n] 1: of a completion, its eos included; None: a text, all of it counts
    labels: NDArray[np.uint8] | None = None  # [documents] 1: a wanted completion, 0: one to avoid; None: not known
    tokenizer_sha256: str = ""  # of the vocabulary and its rules; "": not known

    def document_of(self, position: int) -> int:
        """The number, from 0, of the document that the token at `position` belongs to."""
        return int(np.searchsorted(self.doc_ends, position, side="right"))


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    format: int
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    tokens: int
    documents: int
    rows: int
    rows_skipped: int
    tokens_sha256: str
    docs_sha256: str
    mask_sha256: str | None = None  # None, and not in the file: a text
    labels_sha256: str | None = None  # None, and not in the file: without labels


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
        build_cache(config, folder, fingerprint, memory)
        return _open(folder, fingerprint)


def cached(fingerprint: str, cache_dir: Path) -> Corpus | None:
    """The corpus of this fingerprint as it lies in the cache, whatever became of its source; None where it does not.

    For reading only: sizes are checked, checksums are not, which would read the whole corpus.
    """
    try:
        return _open(_folder(cache_dir, fingerprint), fingerprint, verify=False)
    except _Damaged:
        return None


def count(fingerprint: str, cache_dir: Path) -> int | None:
    """Tokens of the corpus of this fingerprint, from its meta.json; None where it is not in the cache."""
    try:
        meta = _read_meta(_folder(cache_dir, fingerprint) / "meta.json")
    except _Damaged:
        return None
    return meta.tokens if meta.format == FORMAT and meta.fingerprint == fingerprint else None


def lock(folder: Path, say: Say = lambda line: None) -> AbstractContextManager[None]:
    """Hold the lock file beside a corpus; wait for it, with a line."""
    message = "data: another process is preparing this data; waiting for it"
    return disk.lock_file(folder.with_suffix(".lock"), lambda: say(message))


def _folder(cache_dir: Path, fingerprint: str) -> Path:
    return cache_dir / "tokens" / hashlib.sha256(f"{FORMAT} {fingerprint}".encode()).hexdigest()[:16]


def _open(folder: Path, fingerprint: str, verify: bool = True) -> Corpus:
    """Raises _Damaged. `verify`: by its checksums."""
    meta = _read_meta(folder / "meta.json")
    if meta.format != FORMAT or meta.fingerprint != fingerprint or meta.dtype not in ("<u2", "<u4"):
        raise _Damaged("meta.json is of other data")
    tokens = _map(folder / "tokens.bin", meta.dtype, meta.tokens)
    doc_ends = _map(folder / "docs.bin", "<u8", meta.documents)
    parts = [(tokens, meta.tokens_sha256), (doc_ends, meta.docs_sha256)]
    mask = None if meta.mask_sha256 is None else _map(folder / "mask.bin", "u1", meta.tokens)
    labels = None if meta.labels_sha256 is None else _map(folder / "labels.bin", "u1", meta.documents)
    for array, sha256 in ((mask, meta.mask_sha256), (labels, meta.labels_sha256)):
        if array is not None:
            parts.append((array, str(sha256)))
    seen = folder, (folder / "meta.json").stat().st_mtime_ns
    if verify and seen not in _verified:
        for array, sha256 in parts:
            if hashlib.sha256(array.data).hexdigest() != sha256:
                raise _Damaged("wrong checksum")
        _verified.add(seen)
    return Corpus(tokens, doc_ends, meta.vocab_size, fingerprint, folder, mask, labels, meta.tokenizer_sha256)


_verified: set[tuple[Path, int]] = set()
"""meta.json files, by time of change, whose checksums this process has seen right."""


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


def default_cache_dir() -> Path:
    """$STABSTUDY_CACHE, else $XDG_CACHE_HOME/stabstudy, else ~/.cache/stabstudy, else a folder for temporary files.

    The last where no home can be written. Raises DataError if $STABSTUDY_CACHE is set and cannot be written.
    """
    if folder := os.environ.get("STABSTUDY_CACHE"):
        if not _writable(Path(folder)):
            raise DataError("$STABSTUDY_CACHE", "must be a folder that can be written", repr(folder))
        return Path(folder)
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
    if folder := os.environ.get("STABSTUDY_CACHE"):
        return Path(folder) if Path(folder).is_dir() else None
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


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def build_cache(config: DataConfig, folder: Path, fingerprint: str, memory: Memory) -> None:
    """Only under the lock. All or nothing: also when the process is killed at any moment."""
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(leftover)
    tmp = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _tokenize(config, tmp, fingerprint, memory.say)
        if sources.fingerprint(config, memory) != fingerprint:
            raise DataError("data.path", "must not change while it is read", str(config.path or config.source))
        if folder.exists():
            folder.rename(tmp / "damaged")
        tmp.rename(folder)
        disk.sync_folder(folder.parent)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _tokenize(config: DataConfig, folder: Path, fingerprint: str, say: Say) -> None:
    """Write the files, synced."""
    if config.source in HUB and config.hub_revision is None and not Path(config.path or "").expanduser().is_dir():
        say(f"data: {config.path} is read without data.hub_revision: nothing pins its content")
    say(f"data: tokenizing {config.path or config.source} with {config.tokenizer}")
    encoder, count = tokenizer.load(config.tokenizer), RowCount(config.bad_rows)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    with contextlib.ExitStack() as open_files:
        names = ["tokens", "docs", *["mask"] * (config.source in EXAMPLES), *["labels"] * config.labelled]
        sinks = {name: _Sink(open_files.enter_context((folder / f"{name}.bin").open("wb"))) for name in names}
        tokens, docs, chosen = sinks["tokens"], sinks["docs"], 0
        characters, progress = 0, Progress(say, "million characters")
        for batch in _batches(sources.examples(config, count, encoder.template or Plain())):
            framed = _framed(batch, encoder)
            if "mask" in sinks:
                sinks["mask"].write(np.concatenate([_mask(len(ids), first) for ids, first in framed]))
            if "labels" in sinks:
                sinks["labels"].write(np.array([example.label for example in batch], np.uint8))
                chosen += sum(example.label is True for example in batch)
            docs.write((tokens.items + np.cumsum([len(ids) for ids, _ in framed])).astype("<u8"))
            tokens.write(_checked(np.concatenate([ids for ids, _ in framed]), encoder, tokens.items).astype(dtype))
            characters += sum(len(example.prompt) + len(example.completion) for example in batch)
            progress.update(f"tokenized {docs.items:,} documents", characters / 1e6)
        if not tokens.items:
            raise DataError("data.tokenizer", "gives no token for this text", repr(config.tokenizer))
        sums = {f"{name}_sha256": sink.finish() for name, sink in sinks.items()}
        meta = Meta(
            format=FORMAT,
            fingerprint=fingerprint,
            tokenizer_sha256=encoder.sha256,
            vocab_size=encoder.vocab_size,
            dtype=dtype,
            tokens=tokens.items,
            documents=docs.items,
            rows=count.rows,
            rows_skipped=count.skipped,
            **sums,
        )
    body = {name: value for name, value in asdict(meta).items() if value is not None}
    store.write_json(folder / "meta.json", body)
    if count.skipped:
        say(f"data: {count.skipped} of {count.rows} rows were unreadable and are left out; the first: {count.first}")
    kinds = f", {chosen:,} chosen and {meta.documents - chosen:,} rejected" if config.labelled else ""
    say(f"data: {meta.tokens:,} tokens in {meta.documents:,} documents{kinds}")


class _Sink:
    """An array on its way to a file: written, counted and hashed at once."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.items = file, hashlib.sha256(), 0

    def write(self, array: NDArray[Any]) -> None:
        self.file.write(array.data)
        self.hash.update(array.data)
        self.items += len(array)

    def finish(self) -> str:
        """Sync the file; its sha256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.hash.hexdigest()


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in lists of about BATCH characters: tokenizers work on many at once, memory holds one list."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        batch.append(example)
        size += len(example.prompt) + len(example.completion)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _framed(batch: list[Example], encoder: Tokenizer) -> list[tuple[NDArray[np.int64], int]]:
    """Each example's ids between bos and eos, of those that the tokenizer has, and the place of its completion there.

    Prompt and completion are tokenized apart, so that no token belongs to both. What a tokenizer's own template wrote
    gets a bos where it begins with none, and an eos where its completion has none.
    """
    bos, eos = (np.array([] if mark is None else [mark], np.int64) for mark in (encoder.bos, encoder.eos))
    has_prompts = any(example.prompt for example in batch)
    prompts = _encoded([e.prompt for e in batch], batch, encoder) if has_prompts else [bos[:0]] * len(batch)
    completions = _encoded([example.completion for example in batch], batch, encoder)
    framed = []
    for example, prompt, completion in zip(batch, prompts, completions, strict=True):
        before = bos[:0] if example.is_own and np.array_equal(prompt[:1], bos) else bos
        after = eos[:0] if example.is_own and np.isin(eos, completion).all() else eos
        framed.append((np.concatenate([before, prompt, completion, after]), len(before) + len(prompt)))
    return framed


def _encoded(texts: list[str], batch: list[Example], encoder: Tokenizer) -> list[Ids]:
    """The ids of a text of each example."""
    if encoder.encode_chats is None or not any(example.is_own for example in batch):
        return encoder.encode(texts)
    ids: list[Ids] = [np.array([], np.int64)] * len(batch)
    for is_own, encode in ((True, encoder.encode_chats), (False, encoder.encode)):
        places = [i for i, example in enumerate(batch) if example.is_own == is_own]
        encoded = encode([texts[i] for i in places]) if places else []
        for place, one in zip(places, encoded, strict=True):
            ids[place] = one
    return ids


def _mask(size: int, first: int) -> NDArray[np.uint8]:
    """[size] 1 from the place `first` on."""
    return (np.arange(size) >= first).astype(np.uint8)


def _checked(ids: NDArray[np.int64], encoder: Tokenizer, before: int) -> NDArray[np.int64]:
    """The ids. Raises DataError if an embedding would have no row for one: on a GPU that is a dead process."""
    wrong = np.flatnonzero((ids < 0) | (ids >= encoder.vocab_size))
    if len(wrong):
        rule = f"token {before + int(wrong[0])} of the corpus must have an id in 0..{encoder.vocab_size - 1}"
        raise DataError("data.tokenizer", rule, str(ids[wrong[0]]))
    return ids
