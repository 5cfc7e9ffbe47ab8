"""The builder of a token cache: it reads, tokenizes and writes a corpus once, whole or not at all.

Documents pass through in lists of about a million characters, so memory holds such a list (or the largest document),
whatever the size of the corpus.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stabstudy import store
from stabstudy.config import DataConfig
from stabstudy.data import sources, tokenizer
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError
from stabstudy.data.progress import Progress, Say
from stabstudy.data.rows import RowCount
from stabstudy.data.tokenizer import Ids, Tokenizer
from stabstudy.trace import sync_folder

FORMAT = 1
BATCH = 1 << 20  # characters tokenized at once


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


def build(config: DataConfig, folder: Path, fingerprint: str, memory: Memory) -> None:
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
        sync_folder(folder.parent)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _tokenize(config: DataConfig, folder: Path, fingerprint: str, say: Say) -> None:
    """Write the three files, synced."""
    if config.source == "hf" and config.hub_revision is None and not Path(config.path or "").expanduser().is_dir():
        say(f"data: {config.path} is read without data.hub_revision: nothing pins its content")
    say(f"data: tokenizing {config.path or config.source} with {config.tokenizer}")
    encoder, count = tokenizer.load(config.tokenizer), RowCount(config.bad_rows)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    with (folder / "tokens.bin").open("wb") as f, (folder / "docs.bin").open("wb") as g:
        tokens, docs, characters, progress = _Sink(f), _Sink(g), 0, Progress(say, "million characters")
        for batch in _batches(sources.documents(config, count)):
            framed = [_framed(ids, encoder) for ids in encoder.encode(batch)]
            docs.write((tokens.items + np.cumsum([len(ids) for ids in framed])).astype("<u8"))
            tokens.write(_checked(np.concatenate(framed), encoder, tokens.items).astype(dtype))
            characters += sum(map(len, batch))
            progress.update(f"tokenized {docs.items:,} documents", characters / 1e6)
        if not tokens.items:
            raise DataError("data.tokenizer", "gives no token for this text", repr(config.tokenizer))
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
            tokens_sha256=tokens.finish(),
            docs_sha256=docs.finish(),
        )
    store.write_json(folder / "meta.json", asdict(meta))
    if count.skipped:
        say(f"data: {count.skipped} of {count.rows} rows were unreadable and are left out; the first: {count.first}")
    say(f"data: {meta.tokens:,} tokens in {meta.documents:,} documents")


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


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about BATCH characters: tokenizers work on many at once, memory holds one list."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _framed(ids: Ids, encoder: Tokenizer) -> NDArray[np.int64]:
    """A document's ids between bos and eos, of those that the tokenizer has."""
    bos, eos = ([] if mark is None else [mark] for mark in (encoder.bos, encoder.eos))
    return np.concatenate([np.array(bos, np.int64), ids, np.array(eos, np.int64)])


def _checked(ids: NDArray[np.int64], encoder: Tokenizer, before: int) -> NDArray[np.int64]:
    """The ids. Raises DataError if an embedding would have no row for one: on a GPU that is a dead process."""
    wrong = np.flatnonzero((ids < 0) | (ids >= encoder.vocab_size))
    if len(wrong):
        rule = f"token {before + int(wrong[0])} of the corpus must have an id in 0..{encoder.vocab_size - 1}"
        raise DataError("data.tokenizer", rule, str(ids[wrong[0]]))
    return ids
