"""Synthetic text from integers alone: the same bytes on every machine, one knob per mechanism.

A document is a Markov chain of words: the last `order` words choose `branching` successors (by a hash, so
no table of them exists), a Zipf law chooses among these. Over that lie copies of earlier stretches and nested brackets;
noise comes last, one knob for each kind, in this order: letters permuted, bursts, flipped bytes, duplicates. Each
mechanism draws from a stream of its own, so turning one knob leaves the others' choices in place, and two cells of a
sweep differ by that mechanism only.

No float and no library generator takes part: a number x stands as the fixed-point integer x * 2^32. The text is ASCII,
random bytes too (7-bit), so that it reads the same under every tokenizer's UTF-8. Documents are made 256 at a time, one
word of each per step of a loop, which is what makes this fast enough in NumPy (about 2 MB/s).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabstudy.config import SyntheticConfig
from stabstudy.data.counter import GOLDEN, U64, chosen, draws, key_of, mix64

Int = NDArray[np.int64]

FRACTION = 32
"""Bits behind the point."""

TABLE_BITS = 20
"""A lookup table of 2^20 entries stands for a distribution; outcomes rarer than that may have no entry."""

Bytes = NDArray[np.uint8]
VERSION = 1
"""Goes into the fingerprint. Raised by any change that alters the text of any knobs."""

BLOCK = 256  # documents made at once; a duplicate repeats a document of its own block
MEDIAN_LOG2_WORDS = 8
SHORTEST, LONGEST = 16, 8192  # words of a document
_SEPARATORS = (" ", ", ", ". ", "\n")
_BRACKETS = ("(", "[", "{", "<", ")", "]", "}", ">")
_OPEN = 1 + len(_SEPARATORS)  # piece 0 is empty; then come separators, brackets, words
_CLOSE = _OPEN + len(_BRACKETS) // 2
_WORD = _OPEN + len(_BRACKETS)
# Roughly English letter frequencies in 64 entries: six random bits choose one.
_LETTERS = "eeeeeeettttttaaaaaoooooiiiinnnnssssrrrrhhhhlllddduuccmmfwgypbvkx"


def zipf_table(size: int, exponent_milli: int) -> Int:
    """[2^20] the rank, from 0, that each of 2^20 equally likely outcomes means: P(rank k) ~ (k+1)^(-exponent)."""
    scaled = log2(np.arange(1, size + 1, dtype=np.int64)) * exponent_milli // 1000
    total = np.cumsum(exp2((27 << FRACTION) - scaled))  # at most 2^16 weights of at most 2^27
    ranks: Int = np.searchsorted(total, np.arange(1 << TABLE_BITS) * total[-1] >> TABLE_BITS, side="right")
    return ranks


def log2(x: Int) -> Int:
    """log2 of integers in [1, 2^31), fixed point, at most 2^-30 too small: one bit per squaring of the mantissa."""
    whole = np.zeros_like(x)
    for bit in (16, 8, 4, 2, 1):
        whole += bit * (x >> (whole + bit) > 0)
    mantissa, fraction = x.astype(np.uint64) << (31 - whole).astype(np.uint64), np.zeros_like(x)
    for _ in range(FRACTION):
        mantissa = mantissa * mantissa >> np.uint64(31)  # in [2^31, 2^33)
        carry = mantissa >> np.uint64(32)
        mantissa >>= carry
        fraction = fraction << 1 | carry.astype(np.int64)
    return whole << FRACTION | fraction


def exp2(x: Int) -> Int:
    """2^x for fixed-point x below 31, rounded down (2^x itself is at most 2^-26 of it too small).

    A product of the roots 2^-1/2, 2^-1/4, 2^-1/8, ...
    """
    whole = -(-x >> FRACTION)
    missing = (whole << FRACTION) - x  # 2^x = 2^whole * 2^-missing, missing in [0, 1)
    result, root = np.full(x.shape, 1 << 32, np.uint64), 1 << 32
    for i in range(1, FRACTION + 1):
        root = math.isqrt(root << 31) if i == 1 else math.isqrt(root << 32)  # 2^32 * 2^-(2^-i)
        taken = (missing >> (FRACTION - i) & 1).astype(np.bool_)
        result = np.where(taken, result * np.uint64(root) >> np.uint64(32), result)
    rounded: Int = (result >> np.clip(32 - whole, 0, 63).astype(np.uint64)).astype(np.int64)
    return rounded


def add_noise(config: SyntheticConfig, index: U64, text: Bytes, ends: Int) -> list[bytes]:
    """The documents `index`, whose clean text lies one behind the other in `text` (changed in place)."""
    sizes = np.diff(ends, prepend=0)
    starts = ends - sizes
    owner = np.repeat(index, sizes)
    place = (np.arange(len(text)) - np.repeat(starts, sizes)).astype(np.uint64)
    _permute_letters(config, index, text, starts, ends)
    _burst(config, text, owner, place)
    _flip(config, text, owner, place)
    texts = [text[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
    return [texts[d] for d in _repeats(config, index)]


def noise_stream(name: str, index: U64) -> U64:
    """The keys of the documents `index` for one purpose. Streams of different names are unrelated."""
    return draws(np.uint64(key_of(*name.encode())), index)


def _permute_letters(config: SyntheticConfig, index: U64, text: Bytes, starts: Int, ends: Int) -> None:
    """Whole documents in an alphabet of their own: a substitution cipher of a-z."""
    for d in np.flatnonzero(chosen(noise_stream("alphabet", index), config.alphabet_permille, 1000)):
        key = noise_stream("letters", index[d : d + 1])
        cipher = np.arange(256, dtype=np.uint8)
        cipher[ord("a") : ord("z") + 1] = ord("a") + np.argsort(
            draws(key, np.arange(26, dtype=np.uint64)), kind="stable"
        )
        text[starts[d] : ends[d]] = cipher[text[starts[d] : ends[d]]]


def _burst(config: SyntheticConfig, text: Bytes, owner: U64, place: U64) -> None:
    """Whole documents of random bytes."""
    hit = chosen(noise_stream("burst", owner), config.burst_permille, 1000)
    text[hit] = draws(noise_stream("burst bytes", owner[hit]), place[hit]) >> np.uint64(57)


def _flip(config: SyntheticConfig, text: Bytes, owner: U64, place: U64) -> None:
    """Single bytes replaced by random ones (one in 128 of which is the old one)."""
    if config.flip_ppm:
        draw = draws(noise_stream("flip", owner), place)
        hit = chosen(draw, config.flip_ppm, 1_000_000)
        text[hit] = draw[hit] & np.uint64(127)


def _repeats(config: SyntheticConfig, index: U64) -> list[int]:
    """For each document of the block, the one whose text it has: itself, or an earlier one."""
    draw = noise_stream("duplicate", index)
    repeats = chosen(draw, config.duplicate_permille, 1000)
    source: list[int] = []
    for d, pick in enumerate(draw.tolist()):
        source.append(source[pick % d] if d and repeats[d] else d)
    return source


@dataclass(frozen=True)
class _Tables:
    """What the knobs fix before the first document."""

    word: Int  # [2^20] word number of a uniform index
    branch: Int  # [2^20] successor number of a uniform index
    pieces: NDArray[np.uint8]  # every piece of text, one behind the other
    piece_start: Int  # [pieces + 1]


def documents(config: SyntheticConfig) -> Iterator[str]:
    """Documents of together exactly `bytes` bytes; the last one is cut to fit."""
    tables, left, first = _tables(config), config.bytes, 0
    while left > 0:
        for document in _block(config, tables, first):
            if left > 0:
                yield document[:left].decode("ascii")
            left -= len(document)
        first += BLOCK


def _block(config: SyntheticConfig, tables: _Tables, first: int) -> list[bytes]:
    """Documents first .. first+BLOCK-1. Each depends on its index alone, a duplicate also on its block."""
    index = np.arange(first, first + BLOCK, dtype=np.uint64)
    lengths = _lengths(config, index)
    order = np.argsort(-lengths, kind="stable")  # longest first: the documents still growing are always a prefix
    back = np.argsort(order, kind="stable")
    words = _words(config, tables, index[order], lengths[order])[:, back]
    brackets = _brackets(config, index[order], lengths[order])[:, back]
    text, ends = _spell(tables, index, lengths, words.T, brackets.T)
    return add_noise(config, index, text, ends)


def _lengths(config: SyntheticConfig, index: U64) -> Int:
    """Words per document: log2 is 8 plus a near-normal deviate (a sum of four uniforms) times the tail knob."""
    draw = _stream("length", index)
    uniforms = np.stack([draw >> np.uint64(16 * i) & np.uint64(0xFFFF) for i in range(4)]).astype(np.int64)
    deviation = (uniforms.sum(axis=0) - 2 * 0xFFFF) * 113_511  # 2^32 / (2^16 * sqrt(4/12)): 1 sd is 2^32
    log2_words = (MEDIAN_LOG2_WORDS << FRACTION) + deviation * config.tail_milli // 1000
    return np.clip(exp2(np.minimum(log2_words, 30 << FRACTION)), SHORTEST, LONGEST)


def _words(config: SyntheticConfig, tables: _Tables, index: U64, lengths: Int) -> Int:
    """Word numbers [longest, documents]; documents in falling order of length."""
    choice = draws(_stream("word", index), np.arange(lengths[0], dtype=np.uint64)[:, None])
    branch = tables.branch[choice >> np.uint64(64 - TABLE_BITS)].astype(np.uint64)
    source = _copies(config, index, lengths)
    words, context = np.zeros(branch.shape, np.int64), np.zeros(len(index), np.uint64)
    remembered = np.uint64((1 << 17 * config.order) - 1)  # 17 bits a word: 0 stands for "before the start"
    for t, live in enumerate(_live(lengths)):
        seen = context[:live] * np.uint64(GOLDEN) + branch[t, :live] if config.order else choice[t, :live]
        fresh = tables.word[mix64(seen) >> np.uint64(64 - TABLE_BITS)]
        copied = words[np.maximum(source[t, :live], 0), np.arange(live)]
        words[t, :live] = np.where(source[t, :live] >= 0, copied, fresh)
        context[:live] = (context[:live] << np.uint64(17) | (words[t, :live] + 1).astype(np.uint64)) & remembered
    return words


def _copies(config: SyntheticConfig, index: U64, lengths: Int) -> Int:
    """For each word the earlier position that it repeats, or -1. A copy is 4 to 19 words, unless a new one starts."""
    time = np.arange(lengths[0], dtype=np.int64)[:, None]
    draw = draws(_stream("copy", index), time.astype(np.uint64))
    run = 4 + (draw & np.uint64(15)).astype(np.int64)
    source = (draw >> np.uint64(4) & np.uint64(0xFFFFFF)).astype(np.int64) * time >> 24  # uniform in [0, time)
    begins = chosen(draw, config.copy_permille, 1000) & (time > 0)
    begin = np.maximum.accumulate(np.where(begins, time, -1), axis=0)  # of the copy that could still be going on
    since, start = time - begin, np.maximum(begin, 0)
    going_on = (begin >= 0) & (since < np.take_along_axis(run, start, axis=0))
    return np.where(going_on, np.take_along_axis(source, start, axis=0) + since, -1)


def _brackets(config: SyntheticConfig, index: U64, lengths: Int) -> Int:
    """For each word a bracket piece, or 0: opened before it or closed behind it, well nested, all closed at the end."""
    draw = draws(_stream("bracket", index), np.arange(lengths[0], dtype=np.uint64)[:, None])
    wish, kind = (draw >> np.uint64(56)).astype(np.int64), (draw & np.uint64(3)).astype(np.int64)
    pieces, depth, stack = np.zeros(wish.shape, np.int64), *np.zeros((2, len(index)), np.int64)  # stack: 2 bits a level
    for t, live in enumerate(_live(lengths)):
        d, s, left = depth[:live], stack[:live], lengths[:live] - t  # left: words to come, this one included
        closes = (d > 0) & ((wish[t, :live] >= 208) | (left <= d))
        opens = ~closes & (wish[t, :live] < 12) & (d < config.nesting) & (left > d + 1)
        pieces[t, :live] = opens * (_OPEN + kind[t, :live]) + closes * (_CLOSE + (s & 3))
        stack[:live] = np.where(opens, s << 2 | kind[t, :live], s >> 2 * closes)
        depth[:live] += opens.astype(np.int64) - closes
    return pieces


def _live(lengths: Int) -> list[int]:
    """For each step, how many documents (in falling order of length) are longer than it."""
    live: list[int] = np.searchsorted(-lengths, -np.arange(lengths[0]), side="left").tolist()
    return live


def _spell(tables: _Tables, index: U64, lengths: Int, words: Int, brackets: Int) -> tuple[NDArray[np.uint8], Int]:
    """The text of all documents in one array, and where each ends; words and brackets as [documents, longest]."""
    time = np.arange(words.shape[1])
    written = time < lengths[:, None]
    draw = draws(_stream("separator", index)[:, None], time.astype(np.uint64))[written] >> np.uint64(56)
    separator = 1 + np.searchsorted([200, 230, 252], draw.astype(np.int64), side="right")  # of 256
    last = np.cumsum(lengths) - 1
    separator[last] = len(_SEPARATORS)
    bracket = brackets[written]
    opens = bracket < _CLOSE
    pieces = np.stack([bracket * opens, _WORD + words[written], bracket * ~opens, separator], axis=1)
    sizes = np.diff(tables.piece_start)[pieces]
    ends = np.cumsum(sizes.sum(axis=1))[last]
    offset = tables.piece_start[pieces].ravel() - np.cumsum(sizes) + sizes.ravel()
    return tables.pieces[np.repeat(offset, sizes.ravel()) + np.arange(ends[-1])], ends


def _stream(name: str, index: U64) -> U64:
    return noise_stream(f"text {VERSION} {name}", index)


def _tables(config: SyntheticConfig) -> _Tables:
    pieces = ["", *_SEPARATORS, *_BRACKETS, *_lexicon(config.vocabulary)]
    return _Tables(
        word=zipf_table(config.vocabulary, config.zipf_milli),
        branch=zipf_table(config.branching, config.zipf_milli),
        pieces=np.frombuffer("".join(pieces).encode("ascii"), np.uint8),
        piece_start=np.cumsum([0, *map(len, pieces)]),
    )


def _lexicon(size: int) -> list[str]:
    """Distinct words, the frequent ones shorter: 2 to 5 letters, one more for every three doublings of the rank."""
    draw = draws(np.uint64(key_of(VERSION)), np.arange(size, dtype=np.uint64)).tolist()
    words: dict[str, None] = {}
    for rank, bits in enumerate(draw, start=1):
        length = 2 + (bits >> 62) + rank.bit_length() // 3
        attempt = 0
        while len(words) < rank:
            letters = bits if attempt == 0 else key_of(bits, attempt)
            words["".join([_LETTERS[letters >> 6 * i & 63] for i in range(length + attempt // 64)])] = None
            attempt += 1
    return list(words)
