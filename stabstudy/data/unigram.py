"""The unigram entropy of a training part: the loss of a model that knows only how frequent each token is.

    <cache>/tokens/<key>/unigram-<seq_len>-<validation_share>.json    beside the tokens: which of them are trained on
                                                                      depends on these two settings

A trial whose loss never falls below it has learned nothing that could become unstable, and one whose loss ends above it
after having been below has lost what it had learned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stabstudy import store
from stabstudy.data import tokens
from stabstudy.data.tokens import Corpus

CHUNK = 1 << 20  # tokens counted at once: memory holds 8 MB, whatever the size of the corpus
Span = tuple[int, int]  # first position, first position behind it


def entropy(corpus: Corpus, spans: Sequence[Span], seq_len: int, validation_share: float) -> float:
    """-sum p ln p over the tokens at these positions, in nat/token; they are the targets of one training epoch.

    Counted once for each (corpus, seq_len, validation_share), by one process while others wait, and kept beside the
    tokens. Where the cache cannot be written it is counted each time.
    """
    path = corpus.folder / f"unigram-{seq_len}-{validation_share!r}.json"
    targets = sum(stop - start for start, stop in spans)
    value = _read(path, targets, corpus.vocab_size)
    if value is None:
        with contextlib.suppress(OSError), tokens.lock(corpus.folder):
            value = _read(path, targets, corpus.vocab_size)  # another process may have counted meanwhile
            if value is None:
                value = measure(corpus, spans)
                store.sweep_leftovers(corpus.folder)
                store.write_json(path, {"unigram_entropy": value, "targets": targets})
    return measure(corpus, spans) if value is None else value


def measure(corpus: Corpus, spans: Sequence[Span]) -> float:
    """As `entropy`, from the tokens themselves."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    for start, stop in spans:
        for position in range(start, stop, CHUNK):
            chunk = corpus.tokens[position : min(position + CHUNK, stop)]
            counts += np.bincount(chunk, minlength=corpus.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _read(path: Path, targets: int, vocab_size: int) -> float | None:
    """The number in the file; None where there is no file, or none that can be true of these targets."""
    try:
        body = store.read_json(path)
    except store.StoreError:
        return None
    value = body.get("unigram_entropy")
    if body.get("targets") != targets or not isinstance(value, float):
        return None
    return value if 0 <= value <= math.log(vocab_size) + 1e-9 else None
