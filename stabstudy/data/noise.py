"""Noise for synthetic text, one knob for each kind, in this order: letters permuted, bursts, flipped bytes, duplicates.

Random bytes are 7-bit, so that noisy text is still ASCII and reads the same under every tokenizer's UTF-8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stabstudy.config import SyntheticConfig
from stabstudy.data.counter import U64, chosen, draws, key_of
from stabstudy.data.zipf import Int

Bytes = NDArray[np.uint8]


def add(config: SyntheticConfig, index: U64, text: Bytes, ends: Int) -> list[bytes]:
    """The documents `index`, whose clean text lies one behind the other in `text` (changed in place)."""
    sizes = np.diff(ends, prepend=0)
    starts = ends - sizes
    owner = np.repeat(index, sizes)
    place = (np.arange(len(text)) - np.repeat(starts, sizes)).astype(np.uint64)
    _permute_letters(config, index, text, starts, ends)
    _burst(config, text, owner, place)
    _flip(config, text, owner, place)
    made = [text[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
    return [made[d] for d in _repeats(config, index)]


def stream(name: str, index: U64) -> U64:
    """The keys of the documents `index` for one purpose. Streams of different names are unrelated."""
    return draws(np.uint64(key_of(*name.encode())), index)


def _permute_letters(config: SyntheticConfig, index: U64, text: Bytes, starts: Int, ends: Int) -> None:
    """Whole documents in an alphabet of their own: a substitution cipher of a-z."""
    for d in np.flatnonzero(chosen(stream("alphabet", index), config.alphabet_permille, 1000)):
        key = stream("letters", index[d : d + 1])
        cipher = np.arange(256, dtype=np.uint8)
        cipher[ord("a") : ord("z") + 1] = ord("a") + np.argsort(
            draws(key, np.arange(26, dtype=np.uint64)), kind="stable"
        )
        text[starts[d] : ends[d]] = cipher[text[starts[d] : ends[d]]]


def _burst(config: SyntheticConfig, text: Bytes, owner: U64, place: U64) -> None:
    """Whole documents of random bytes."""
    hit = chosen(stream("burst", owner), config.burst_permille, 1000)
    text[hit] = draws(stream("burst bytes", owner[hit]), place[hit]) >> np.uint64(57)


def _flip(config: SyntheticConfig, text: Bytes, owner: U64, place: U64) -> None:
    """Single bytes replaced by random ones (one in 128 of which is the old one)."""
    if config.flip_ppm:
        draw = draws(stream("flip", owner), place)
        hit = chosen(draw, config.flip_ppm, 1_000_000)
        text[hit] = draw[hit] & np.uint64(127)


def _repeats(config: SyntheticConfig, index: U64) -> list[int]:
    """For each document of the block, the one whose text it has: itself, or an earlier one."""
    draw = stream("duplicate", index)
    repeats = chosen(draw, config.duplicate_permille, 1000)
    source: list[int] = []
    for d, pick in enumerate(draw.tolist()):
        source.append(source[pick % d] if d and repeats[d] else d)
    return source
