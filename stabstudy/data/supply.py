"""The number of training tokens: exact from the token cache, else an upper bound from the size of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stabstudy.config import DataConfig
from stabstudy.data import files, pysrc, tokens
from stabstudy.data.batches import training_windows
from stabstudy.data.synthetic import SHORTEST

MARKS = 2  # tokens of a document beside its text: bos and eos
SHORT = 100  # bytes; documents of which no more is known are taken to be as long on average, or longer


@dataclass(frozen=True)
class Supply:
    """Targets in one epoch of a trial's training part; `exact`, or no more than so many."""

    tokens: int
    exact: bool


def supply(config: DataConfig, fingerprint: str, cache_dir: Path | None) -> Supply | None:
    """The supply of these settings; None where neither a cache nor a size tells. Reads no text and loads no tokenizer.

    Raises DataError where the source's files cannot be found.
    """
    count = None if cache_dir is None else tokens.count(fingerprint, cache_dir)
    total = most_tokens(config) if count is None else count
    if total is None:
        return None
    windows = training_windows(total, config.seq_len, config.validation_share)
    return Supply(windows * config.seq_len, exact=count is not None)


def most_tokens(config: DataConfig) -> int | None:
    """An upper bound of the corpus's tokens: a token is a byte of text or more, and each document has two marks.

    None where the size on disk is none of the text: compressed files, Parquet, the hub without data.max_bytes.
    """
    measure = _SIZES.get(config.source)
    size = None if measure is None else measure(config)
    if config.max_bytes is None or (size is not None and size < config.max_bytes):
        return size
    return config.max_bytes + MARKS * (config.max_bytes // SHORT + 1)


def _pysrc(config: DataConfig) -> int:
    return sum(path.stat().st_size + MARKS for _, path in pysrc.modules())


def _synthetic(config: DataConfig) -> int:
    shortest = 3 * SHORTEST  # bytes of a document: words of two letters and more, each with a separator
    size = config.synthetic.bytes
    return size + MARKS * (size // shortest + 1)


def _text(config: DataConfig) -> int:
    return sum(file.size + MARKS for file in files.find(config))


def _json_lines(config: DataConfig) -> int | None:
    """The keys and quotes of a row take more bytes than its two marks."""
    rows = files.find(config)
    compressed = any(file.name.endswith((".gz", ".zst", ".zstd")) for file in rows)
    return None if compressed else sum(file.size for file in rows)


_SIZES: dict[str, Callable[[DataConfig], int | None]] = {
    "pysrc": _pysrc,
    "synthetic": _synthetic,
    "text": _text,
    "jsonl": _json_lines,
    "lingua": _json_lines,
}
