"""The batches of a trial, the unigram entropy of its data, and how many tokens there are.

The corpus is laid out as sequences of seq_len + 1 tokens (`layouts`). A few contiguous blocks of them, spread over the
corpus, are held out to validate; the sequence on either side of a block is used for nothing, so no token is in both
parts.

Sequence i of step s is number w = s * batch_size + i of an endless list: epoch w // n of the n training windows, in the
order of a permutation keyed by (seed, epoch). So a trial has no data state to save, splitting a batch changes nothing,
and 2 steps of 8 read what 1 step of 16 reads. No setting but the seed changes the order, and nothing has to be recorded
to show later what the model read at a spike (`step_texts`).

The unigram entropy is what a model pays that knows no context. A trial whose loss never falls below it has learned
nothing that could become unstable, and one whose loss ends above it after having been below has lost what it had
learned. Which tokens are trained on depends on two settings, so it is kept beside them as
<cache>/tokens/<key>/unigram-<seq_len>-<validation_share>.json.

The number of training tokens (`supply`) is exact from the token cache, else an upper bound from the size of the text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabstudy import store
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.data import files, sources, tokenizer, tokens
from stabstudy.data.counter import draws, key_of, permuted
from stabstudy.data.examples import PARQUET
from stabstudy.data.files import Say
from stabstudy.data.layouts import LAYOUTS, Layout, Span, Window
from stabstudy.data.synthetic import SHORTEST
from stabstudy.data.tokens import Corpus
from stabstudy.settings import DataError

Int = NDArray[np.int64]
Stretch = tuple[int, int]  # first window, first window behind it

BLOCKS = 8
"""Contiguous stretches of held-out windows. Many would leak: text next to a window resembles it."""

AHEAD = 4096  # sequences whose place is computed at once

CHUNK = 1 << 20  # tokens counted at once: memory holds 8 MB, whatever the size of the corpus
MARKS = 2  # tokens of a document beside its text: bos and eos
SHORT = 100  # bytes; documents of which no more is known are taken to be as long on average, or longer


class Batches:
    """The batches of one trial. B = batch_size, T = seq_len.

    Raises DataError if the corpus is too small: for one window, for one batch, for the evaluation.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int,
        validation_share: float,
        eval_sequences: int,
        final_sequences: int = 0,
        layout: str = "packed",
    ):
        self.corpus, self.seq_len, self.batch_size, self.seed = corpus, seq_len, batch_size, seed
        self.validation_share = validation_share
        self.layout: Layout = LAYOUTS[layout](corpus, seq_len)
        windows = self.layout.count
        held, free = _split(windows, validation_share)
        self._training, self._validation = _Segments(free), _Segments(held)
        self._targets = self.layout.spans(free)  # positions, masked ones included
        of = f"of the data's {windows} windows of {seq_len} tokens (data.validation_share {validation_share:g})"
        if self.training_windows < batch_size:
            rule = f"must be at most {self.training_windows}, the training part {of}"
            raise DataError("train.batch_size", rule, str(batch_size))
        if self.validation_windows < eval_sequences:
            rule = f"must be at most {self.validation_windows}, the validation part {of}"
            raise DataError("train.eval_sequences", rule, str(eval_sequences))
        self._evaluation = self._spread(eval_sequences)
        if self.masked:  # as many targets as sequences full of them have
            targets = self._count(self.layout.spans(held))
            final_sequences = math.ceil(final_sequences * seq_len * self.validation_windows / max(1, targets))
        self._final_evaluation = self._spread(min(max(eval_sequences, final_sequences), self.validation_windows))
        self._steps_ahead = max(1, AHEAD // batch_size)
        self._part, self._ahead = 0, self._order(0, self._steps_ahead)
        if self.masked:
            self._check_targets()

    @property
    def masked(self) -> bool:
        """Whether some tokens are no targets: those of prompts, and what is filled up."""
        return self.corpus.mask is not None

    @property
    def labelled(self) -> bool:
        """Whether arrays of windows have a last column more: the flag of each sequence, see `layouts`."""
        return self.layout.width > self.seq_len + 1

    @property
    def training_windows(self) -> int:
        """Sequences in one epoch."""
        return self._training.size

    @property
    def validation_windows(self) -> int:
        return self._validation.size

    @functools.cached_property
    def training_tokens(self) -> int:
        """Targets in one epoch: each token of the training part is one once; of examples, those of completions."""
        return self._count(self._targets) if self.masked else self.training_windows * self.seq_len

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """Of the targets in one epoch, nat/token: what a model pays that knows no context. From the token cache."""
        padded = "-padded" if self.layout.name == "padded" else ""
        kept = f"unigram-{self.seq_len}-{self.validation_share!r}{padded}.json"
        return unigram_entropy(self.corpus, self._targets, self.training_tokens, kept)

    def batch(self, step: int) -> Int:
        """[B, T+1] token ids of a step, from 0; inputs are [:, :-1], targets [:, 1:]. Of examples see `layouts`.

        [B, T+2] where they are `labelled`, here and in `evaluation` and `final_evaluation`.
        """
        return self.layout.windows(self._indices(step))

    def positions(self, step: int) -> Int:
        """[B] where the sequences of `batch` begin in `layout.flat()`."""
        return self.layout.positions(self._indices(step))

    def evaluation(self) -> Int:
        """[eval_sequences, T+1] token ids: the same for every seed and batch size, spread over the validation part."""
        return self.layout.windows(self._evaluation)

    def final_evaluation(self) -> Int:
        """[n, T+1] token ids that the first and the last loss are measured on, spread as those of `evaluation`.

        n is the larger of `eval_sequences` and `final_sequences` (of examples: of as many as hold so many targets), or
        all of the validation part. On a thousand tokens the error of the set, which all seeds share and no interval
        over seeds contains, is as large as theirs.
        """
        return self.layout.windows(self._final_evaluation)

    @property
    def eval_hash(self) -> str:
        """16 hex digits of the final evaluation's tokens. Losses on different hashes are never compared."""
        return hashlib.sha256(self.final_evaluation().astype("<i8").tobytes()).hexdigest()[:16]

    def windows(self, step: int) -> list[Window]:
        """Where each sequence of a step comes from, in the order of `batch`."""
        return [self.layout.window(index) for index in self._indices(step).tolist()]

    def _count(self, spans: Sequence[Span]) -> int:
        """Targets at these positions, of examples."""
        assert (mask := self.corpus.mask) is not None
        return sum(int(np.count_nonzero(mask[start:stop])) for start, stop in spans)

    def _spread(self, count: int) -> Int:
        """[count] window numbers, evenly over the validation part."""
        return self._validation.at(np.arange(count, dtype=np.int64) * self.validation_windows // count)

    def _indices(self, step: int) -> Int:
        """[B] window numbers of a step, out of a stretch of steps computed at once: NumPy is slow on few numbers."""
        part, offset = divmod(step, self._steps_ahead)
        if part != self._part:
            self._part, self._ahead = part, self._order(part * self._steps_ahead, self._steps_ahead)
        indices: Int = self._ahead[offset]
        return indices

    def _order(self, step: int, steps: int) -> Int:
        """[steps, B] window numbers of the steps from `step` on."""
        place = np.arange(steps * self.batch_size, dtype=np.uint64) + np.uint64(step * self.batch_size)
        epoch, within = np.divmod(place, np.uint64(self.training_windows))
        keys = draws(np.uint64(key_of(self.seed)), epoch)
        order = permuted(within, self.training_windows, keys).astype(np.int64)
        return self._training.at(order.reshape(steps, self.batch_size))

    def _check_targets(self) -> None:
        """Raises DataError where nothing could be learned, or nothing measured."""
        rule = "must be larger: {}, in sequences of so many tokens, has no token of a completion"
        if self.training_tokens == 0:
            raise DataError("data.seq_len", rule.format("the training part of the data"), str(self.seq_len))
        if not all(
            (windows[:, 1 : self.seq_len + 1] >= 0).any() for windows in (self.evaluation(), self.final_evaluation())
        ):
            got = f"{len(self._evaluation)} sequences"
            raise DataError("train.eval_sequences", rule.format("the evaluation set"), got)


def open_batches(
    config: TrialConfig, cache_dir: Path, say: Say = lambda line: None, expected: str | None = None
) -> Batches:
    """The batches of a trial, its corpus taken from the cache or built into it; arguments as of `tokens.prepare`.

    Raises DataError, also where the data have not the `expected` fingerprint: before anything is built from them.
    """
    batches = laid_out(config, tokens.prepare(config.data, cache_dir, say, expected))
    if batches.layout.cuts:
        say(f"data: {batches.layout.cuts}")
    return batches


def laid_out(config: TrialConfig, corpus: Corpus) -> Batches:
    """The batches of a trial over this corpus. Raises DataError where it is too small."""
    data, train = config.data, config.train
    sizes = train.batch_size, config.seed, data.validation_share, train.eval_sequences, config.final_eval_sequences
    return Batches(corpus, data.seq_len, *sizes, layout=data.layout)


class _Segments:
    """Stretches of window numbers, counted through as one list."""

    def __init__(self, stretches: list[Stretch]):
        sizes = np.array([stop - start for start, stop in stretches], np.int64)
        self.size = int(sizes.sum())
        self.ends = np.cumsum(sizes)
        self.shift = np.array([start for start, _ in stretches], np.int64) - (self.ends - sizes)

    def at(self, ordinal: Int) -> Int:
        """The window number of each ordinal in 0..size-1, elementwise."""
        segment = np.searchsorted(self.ends, ordinal, side="right")
        window: Int = ordinal + self.shift[segment]
        return window


def training_windows(tokens: int, seq_len: int, validation_share: float) -> int:
    """Sequences in one epoch of a corpus of so many tokens; 0 where it is too small."""
    windows = (tokens - 1) // seq_len
    return sum(stop - start for start, stop in _split(windows, validation_share)[1]) if windows > 0 else 0


def _split(windows: int, share: float) -> tuple[list[Stretch], list[Stretch]]:
    """(start, stop) of each held-out block, and of each stretch that is left for training.

    The blocks lie in the middle of equal parts of the corpus. At least one window is held out. Nothing but the number
    of windows and the share decides.
    """
    held = max(1, int(windows * share))
    count = min(BLOCKS, held)
    blocks = []
    for b in range(count):
        low, high = b * windows // count, (b + 1) * windows // count
        size = min((b + 1) * held // count - b * held // count, high - low)
        start = low + (high - low - size) // 2
        blocks.append((start, start + size))
    edges = [(-2, -1), *blocks, (windows + 1, windows + 2)]  # one window is left unused on either side of a block
    free = [(before[1] + 1, after[0] - 1) for before, after in zip(edges, edges[1:], strict=False)]
    return blocks, [(start, stop) for start, stop in free if stop > start]


def unigram_entropy(corpus: Corpus, spans: Sequence[Span], targets: int, kept: str) -> float:
    """-sum p ln p over the targets at these positions, in nat/token; there are so many of them in a training epoch.

    Counted once for each name of a file, `kept` beside the tokens, by one process while others wait. Where the cache
    cannot be written it is counted each time.
    """
    path = corpus.folder / kept
    value = _read(path, targets, corpus.vocab_size)
    if value is None:
        with contextlib.suppress(OSError), tokens.lock(corpus.folder):
            value = _read(path, targets, corpus.vocab_size)  # another process may have counted meanwhile
            if value is None:
                value = measure_entropy(corpus, spans)
                store.sweep_leftovers(corpus.folder)
                store.write_json(path, {"unigram_entropy": value, "targets": targets})
    return measure_entropy(corpus, spans) if value is None else value


def measure_entropy(corpus: Corpus, spans: Sequence[Span]) -> float:
    """As `entropy`, from the tokens themselves."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    for start, stop in spans:
        for position in range(start, stop, CHUNK):
            chunk = corpus.tokens[position : min(position + CHUNK, stop)]
            if corpus.mask is not None:
                chunk = chunk[corpus.mask[position : position + len(chunk)] == 1]
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
    if config.layout == "padded":
        return None  # how many sequences there are is known when they are tokenized
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
    return sum(path.stat().st_size + MARKS for _, path in sources.python_modules())


def _synthetic(config: DataConfig) -> int:
    shortest = 3 * SHORTEST  # bytes of a document: words of two letters and more, each with a separator
    size = config.synthetic.bytes
    return size + MARKS * (size // shortest + 1)


def _text(config: DataConfig) -> int:
    return sum(file.size + MARKS for file in files.find(config))


def _json_lines(config: DataConfig) -> int | None:
    """The keys and quotes of a row take more bytes than its two marks."""
    rows = files.find(config)
    compressed = any(file.name.lower().endswith((".gz", ".zst", ".zstd", *PARQUET)) for file in rows)
    return None if compressed else sum(file.size for file in rows)


def _examples(config: DataConfig) -> int | None:
    """The plain template writes less than a row's keys and quotes. Pairs, whose prompts count twice, are padded."""
    return None if tokenizer.template_identity(config.tokenizer) else _json_lines(config)


_SIZES: dict[str, Callable[[DataConfig], int | None]] = {
    "pysrc": _pysrc,
    "synthetic": _synthetic,
    "text": _text,
    "jsonl": _json_lines,
    "lingua": _json_lines,
    "examples": _examples,
}
