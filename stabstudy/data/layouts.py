"""Layouts: how a corpus is laid out as sequences of seq_len + 1 tokens, and which of their tokens are targets.

    packed    windows at stride seq_len, cut through the documents: the last token of one is the first of the next, so
              that each position is a target once
    padded    one example per sequence, from its first token on; what is longer is cut, what is shorter filled up

In an array of windows a number tells what a token is to training:

    t >= 0           the token t, a target where it is not the first of its window
    IGNORE - 1 - t   the token t is read, and is no target: it belongs to a prompt
    IGNORE           nothing: filled up, or masked out by a test

so that `inputs` and `targets` come from one array, in NumPy and torch alike. With labels (padded only) an array of
windows has a last column more, the `flag` of each sequence, which is no token. Attention is causal, and what is filled
up stands behind all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stabstudy.data.tokens import Corpus
from stabstudy.settings import DataError

IGNORE = -100
"""A target that counts for nothing."""

FLAGS = 1
"""Columns of a labelled array of windows behind its tokens: the `flag` of each sequence."""

Int = NDArray[np.int64]
Span = tuple[int, int]  # first position, first position behind it

CHUNK = 1 << 20  # tokens laid out at once


def hidden(tokens: Int) -> Int:
    """The numbers of tokens that are read and are no targets."""
    return IGNORE - 1 - tokens


def flag(label: Int, clipped: Int) -> Int:
    """The numbers of sequences: label + 2 * clipped; where there is no sequence, IGNORE stands instead.

    label: 1 a completion that is wanted (chosen), 0 one to avoid (rejected). clipped: 1 where the context cut it off.
    """
    return label + 2 * clipped


def read_tokens(windows: Int) -> Int:
    """The tokens that a model reads; 0 for what is filled up."""
    tokens: Int = np.maximum(windows, IGNORE - 1 - windows).clip(min=0)
    return tokens


@dataclass(frozen=True)
class Window:
    """One training sequence of a step, for tracing a spike back to its text."""

    index: int  # among all windows of the corpus
    start: int  # position of its first token
    documents: tuple[int, ...]  # every document that it touches


class Layout(Protocol):
    """Sequences of a corpus, by their number from 0."""

    name: str
    width: int  # columns of an array of windows
    count: int
    truncated: int  # examples that are longer than a sequence
    dropped: int  # examples of which no target is left, which are no sequences

    @property
    def cuts(self) -> str:
        """The two in words; "" where no example is cut."""

    def windows(self, numbers: Int) -> Int:
        """[n, T+1] of these sequences; [n, T+2] where they are labelled."""

    def positions(self, numbers: Int) -> Int:
        """[n] where they begin in `flat`."""

    def flat(self) -> NDArray[Any]:
        """The numbers of all sequences, one array, for a device to keep."""

    def spans(self, stretches: Sequence[Span]) -> list[Span]:
        """Positions in the corpus of the targets in these stretches of sequences, masked ones included."""

    def window(self, number: int) -> Window:
        """Where one comes from."""


class Packed:
    """Windows cut through the documents. Raises DataError for a corpus that has none."""

    name = "packed"
    truncated = dropped = 0
    cuts = ""

    def __init__(self, corpus: Corpus, seq_len: int):
        self.corpus, self.seq_len, self.width = corpus, seq_len, seq_len + 1
        self.count = (len(corpus.tokens) - 1) // seq_len
        if self.count < 1:
            rule = f"must be less than the {len(corpus.tokens)} tokens of the data"
            raise DataError("data.seq_len", rule, str(seq_len))

    def windows(self, numbers: Int) -> Int:
        return _numbers(self.corpus, numbers[:, None] * self.seq_len + np.arange(self.seq_len + 1))

    def positions(self, numbers: Int) -> Int:
        return numbers * self.seq_len

    def flat(self) -> NDArray[Any]:
        corpus, size = self.corpus, len(self.corpus.tokens)
        if corpus.mask is None:
            return corpus.tokens
        parts = [np.arange(first, min(first + CHUNK, size)) for first in range(0, size, CHUNK)]
        return np.concatenate([_numbers(corpus, part).astype(np.int32) for part in parts])

    def spans(self, stretches: Sequence[Span]) -> list[Span]:
        T = self.seq_len
        return [(start * T + 1, stop * T + 1) for start, stop in stretches]

    def window(self, number: int) -> Window:
        start = number * self.seq_len
        first, last = self.corpus.document_of(start), self.corpus.document_of(start + self.seq_len)
        return Window(number, start, tuple(range(first, last + 1)))


class Padded:
    """One example per sequence, of those whose completion begins within it. Raises DataError where there is none.

    The others, of which no target is left, would train nothing: they are counted (`dropped`) and left out, labelled or
    not.
    """

    name = "padded"

    def __init__(self, corpus: Corpus, seq_len: int):
        assert corpus.mask is not None
        self.corpus, self.seq_len = corpus, seq_len
        self.width = seq_len + 1 + (0 if corpus.labels is None else FLAGS)
        ends = corpus.doc_ends.astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        stops = np.minimum(ends, starts + seq_len + 1)
        # a mask is 0 up to the completion and 1 from there on: the last token kept tells, if it is not the first
        has_target = (corpus.mask[stops - 1] == 1) & (stops - starts > 1)
        self._documents = np.flatnonzero(has_target)
        self._starts, self._stops = starts[has_target], stops[has_target]
        if corpus.labels is not None:
            labels = corpus.labels[has_target].astype(np.int64)
            self._flags = flag(labels, (stops < ends)[has_target])
        self.count = len(self._starts)
        self.truncated, self.dropped = int((stops < ends).sum()), int((~has_target).sum())
        if self.count < 1:
            rule = "must be larger: no completion of the data begins within so many tokens"
            raise DataError("data.seq_len", rule, str(seq_len))

    @property
    def cuts(self) -> str:
        if not self.truncated:
            return ""
        left = f", {self.dropped} of them before their completion: left out" if self.dropped else ""
        if self.corpus.labels is not None:
            chosen = int((self._flags % 2).sum())
            left += f"; {chosen:,} chosen and {self.count - chosen:,} rejected ones remain"
        return (
            f"{self.truncated:,} of {len(self.corpus.doc_ends):,} examples are cut at data.seq_len={self.seq_len}{left}"
        )

    def windows(self, numbers: Int) -> Int:
        places = self._starts[numbers][:, None] + np.arange(self.seq_len + 1)
        inside = places < self._stops[numbers][:, None]
        read = np.where(inside, _numbers(self.corpus, np.minimum(places, len(self.corpus.tokens) - 1)), IGNORE)
        return read if self.corpus.labels is None else np.column_stack([read, self._flags[numbers]])

    def positions(self, numbers: Int) -> Int:
        return numbers * self.width

    def flat(self) -> NDArray[Any]:
        rows = max(1, CHUNK // self.seq_len)
        parts = [np.arange(first, min(first + rows, self.count)) for first in range(0, self.count, rows)]
        return np.concatenate([self.windows(part).ravel().astype(np.int32) for part in parts])

    def spans(self, stretches: Sequence[Span]) -> list[Span]:
        numbers = [number for start, stop in stretches for number in range(start, stop)]
        return [(int(self._starts[n]) + 1, int(self._stops[n])) for n in numbers]

    def window(self, number: int) -> Window:
        return Window(number, int(self._starts[number]), (int(self._documents[number]),))


LAYOUTS: dict[str, Callable[[Corpus, int], Layout]] = {"packed": Packed, "padded": Padded}


def _numbers(corpus: Corpus, positions: Int) -> Int:
    """The numbers of the tokens at these positions."""
    tokens: Int = corpus.tokens[positions].astype(np.int64)
    return tokens if corpus.mask is None else np.where(corpus.mask[positions] == 1, tokens, hidden(tokens))
