"""The text of the sequences of one step, to trace a spike back to what the model read.

Which tokens those are is a pure function of the trial's settings (see `batches`), so nothing was recorded for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stabstudy.config import TrialConfig
from stabstudy.data import tokenizer, tokens
from stabstudy.data.batches import open_batches


@dataclass(frozen=True)
class SequenceText:
    """One training sequence of a step."""

    start: int  # position of its first token in the corpus
    documents: tuple[int, ...]  # the numbers, from 0, of those it touches
    text: str  # of its seq_len + 1 tokens; a character cut at an end is U+FFFD


def of_step(config: TrialConfig, step: int, fingerprint: str, cache_dir: Path | None = None) -> list[SequenceText]:
    """The sequences of a step, from 0, in the order of its batch; `fingerprint` is that of the data it was trained on.

    Tokenizes the data again where the cache (None: the user's) no longer holds it. Raises DataError where the data are
    gone, or are other data than those the trial was trained on; ValueError where the trial has no such step.
    """
    if not 0 <= step < config.train.steps:
        raise ValueError(f"the trial has steps 0 to {config.train.steps - 1}, got {step}")
    cache = tokens.default_cache_dir() if cache_dir is None else cache_dir
    batches = open_batches(config, cache, expected=fingerprint)
    decode = tokenizer.load(config.data.tokenizer).decode
    return [
        SequenceText(window.start, window.documents, decode(ids))
        for window, ids in zip(batches.windows(step), batches.batch(step).tolist(), strict=True)
    ]
