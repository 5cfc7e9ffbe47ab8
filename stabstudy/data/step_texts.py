"""The texts that a trial read at one step, from its data or from the token cache alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from stabstudy.config import TrialConfig
from stabstudy.data import tokenizer, tokens
from stabstudy.data.batches import Batches, Int, laid_out, open_batches
from stabstudy.data.layouts import IGNORE, read_tokens
from stabstudy.settings import DataError


@dataclass(frozen=True)
class SequenceText:
    """One training sequence of a step."""

    start: int  # position of its first token in the corpus
    documents: tuple[int, ...]  # the numbers, from 0, of those it touches
    text: str  # of its seq_len + 1 tokens; a character cut at an end is U+FFFD


def text_of_step(config: TrialConfig, step: int, fingerprint: str, cache_dir: Path | None = None) -> list[SequenceText]:
    """The sequences of a step, from 0, in the order of its batch; `fingerprint` is that of the data it was trained on.

    Tokenizes the data again where the cache (None: the user's) no longer holds it. Raises DataError where the data are
    gone, or are other data than those the trial was trained on; ValueError where the trial has no such step.
    """
    _check_step(config, step)
    cache = tokens.default_cache_dir() if cache_dir is None else cache_dir
    batches = open_batches(config, cache, expected=fingerprint)
    return _texts(config, step, batches, tokenizer.load(config.data.tokenizer))


def kept_text_of_step(config: TrialConfig, step: int, fingerprint: str) -> list[SequenceText]:
    """As `text_of_step` from what the user's token cache holds; it tokenizes nothing, and asks no network.

    Raises DataError where the cache does not hold the data, or the tokenizer is not on this machine, or another one.
    """
    _check_step(config, step)
    cache = tokens.existing_cache_dir()
    corpus = None if cache is None else tokens.cached(fingerprint, cache)
    if corpus is None:
        raise DataError("data", "are not in the token cache", fingerprint)
    encoder = _encoder(config.data.tokenizer)
    if encoder.sha256 != corpus.tokenizer_sha256:
        raise DataError("data.tokenizer", "is not the one that the data were tokenized with", config.data.tokenizer)
    return _texts(config, step, laid_out(config, corpus), encoder)


@functools.cache
def _encoder(name: str) -> tokenizer.Tokenizer:
    """Loaded once: a report asks for many steps, and some take seconds."""
    return tokenizer.load(name, offline=True)


def _check_step(config: TrialConfig, step: int) -> None:
    if not 0 <= step < config.train.steps:
        raise ValueError(f"the trial has steps 0 to {config.train.steps - 1}, got {step}")


def _texts(config: TrialConfig, step: int, batches: Batches, encoder: tokenizer.Tokenizer) -> list[SequenceText]:
    sequences = batches.batch(step)[:, : config.data.seq_len + 1]
    return [
        SequenceText(window.start, window.documents, encoder.decode(ids))
        for window, ids in zip(batches.windows(step), _read_ids(sequences), strict=True)
    ]


def _read_ids(windows: Int) -> list[list[int]]:
    """The token ids of each sequence, without what is filled up."""
    return [read_tokens(row[row != IGNORE]).tolist() for row in windows]
