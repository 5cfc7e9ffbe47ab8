"""The sources of text: the documents of each, its fingerprint, its size, and whether it can be used.

    pysrc       the Python standard library's source text (the default: real text without a download)
    synthetic   made from integers; knobs synth_*
    text        a .txt file, or a folder of them; one document per file
    jsonl       {"text": ...} per line, also .gz .zst .zstd; a file or a folder
    parquet     one text column; a file or a folder
    lingua      a folder of Lingua's *.chunk.*.jsonl: every chunk, in order
    hf          a dataset of the Hugging Face hub, streamed once (needs `datasets`)

The order of the documents is fixed (files by name, rows as stored), so a fingerprint stands for one sequence of text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from stabstudy.config import DataConfig
from stabstudy.data import files, hub, pysrc, rows, synthetic, tokenizer
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError
from stabstudy.data.rows import RowCount

VERSION = 1
"""Goes into every fingerprint. Raised when a reader comes to give other text for the same files."""


def documents(config: DataConfig, count: RowCount | None = None) -> Iterator[str]:
    """The documents of a source in their fixed order, empty ones left out, at most `max_bytes` of UTF-8 of them.

    `count` receives how many rows were read and skipped. Raises DataError: what is wrong, in which file and line.
    """
    count = RowCount(config.bad_rows) if count is None else count
    left, found = config.max_bytes, False
    for text in filter(None, _everything(config, count)):
        if left is not None:
            left -= len(text.encode())
            if left < 0:
                break
        found = True
        yield text
    count.finish()
    if not found:
        raise _nothing(config)


def fingerprint(config: DataConfig, memory: Memory | None = None) -> str:
    """16 hex digits of what the tokens depend on: the text, wherever it lies, and the files of a local tokenizer.

    Two configs of one fingerprint give the same tokens. seq_len and validation_share only cut them, and are not in it.
    Hashes content (see `files.digest`), so callers with many trials do it once per distinct DataConfig. With a `memory`
    an edit is seen that the samples of a large file miss.
    Raises DataError where the source or the tokenizer cannot be found.
    """
    body = {
        "version": VERSION,
        "source": config.source,
        "content": _identity(config, memory),
        "max_bytes": config.max_bytes,
        "bad_rows": config.bad_rows,
        "tokenizer": tokenizer.identity(config.tokenizer),
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def packages(config: DataConfig) -> set[str]:
    """The optional packages that reading and tokenizing the text takes. Raises DataError for a tokenizer not there."""
    return tokenizer.packages(config.tokenizer) | ({"datasets"} if config.source == "hf" else set())


def check(config: DataConfig) -> None:
    """Raises DataError for what can be known without reading everything; reaches no network and trains nothing.

    The path and its links, the footer and columns of every Parquet file, the first document, the tokenizer's files.
    Damage further in is found when the token cache is built (`tokens.prepare`), before the first step.
    """
    tokenizer.identity(config.tokenizer)
    if config.source == "hf":
        return
    if config.source == "synthetic" and config.max_bytes is None:
        return  # always has text, and making the first of it takes half a second
    if config.source == "parquet":
        for file in files.find(config):
            rows.check_parquet(file, config.text_column)
    next(documents(config))


def _everything(config: DataConfig, count: RowCount) -> Iterator[str]:
    match config.source:
        case "pysrc":
            yield from pysrc.documents()
        case "synthetic":
            yield from synthetic.documents(config)
        case "hf":
            yield from hub.documents(config, count)
        case _:
            for file in files.find(config):
                yield from rows.texts(config, file, count)


def _identity(config: DataConfig, memory: Memory | None) -> dict[str, Any]:
    match config.source:
        case "pysrc":
            return {"content": pysrc.digest()}
        case "synthetic":
            knobs = {k: v for k, v in vars(config).items() if k.startswith("synth_")}
            return knobs | {"generator": synthetic.VERSION}
        case "hf":
            return hub.identity(config, memory)
        case "jsonl" | "parquet":
            return {"content": _digest(config, memory), "column": config.text_column}
        case _:
            return {"content": _digest(config, memory)}


def _digest(config: DataConfig, memory: Memory | None) -> str:
    return files.digest(files.find(config), memory, config.max_bytes is not None)


def _nothing(config: DataConfig) -> DataError:
    if config.max_bytes is not None:
        return DataError("data.max_bytes", "must hold the source's first document", str(config.max_bytes))
    return DataError("data.path", "holds no text", repr(config.path))
