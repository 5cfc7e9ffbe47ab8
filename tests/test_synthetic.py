"""Synthetic text: the same bytes everywhere, and every knob does what it says, measured on the text itself."""

from __future__ import annotations

import hashlib
import itertools
import lzma
import math
import re
import time
from collections import Counter, defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from stabstudy.config import SyntheticConfig
from stabstudy.data import synthetic
from stabstudy.data.counter import chosen, draws, key_of
from stabstudy.data.synthetic import FRACTION, TABLE_BITS, exp2, log2, zipf_table

SIZE = 300_000


def made(**knobs: Any) -> list[str]:
    """Documents of the defaults but for these knobs; of one length unless asked, which is much faster to make."""
    return list(synthetic.documents(SyntheticConfig(**{"bytes": SIZE, "tail_milli": 0} | knobs)))


def words(document: str) -> list[str]:
    return re.findall("[a-z]+", document)


@pytest.fixture(scope="module")
def clean() -> list[str]:
    return made()


# --- exact arithmetic


def test_draws_are_the_published_splitmix64() -> None:
    # The reference outputs for seed 1234567 that accompany the published generator.
    first = draws(np.uint64(1234567), np.arange(5, dtype=np.uint64)).tolist()
    assert first == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_depend_on_every_part_and_its_place() -> None:
    parts = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (2**64 - 1,), (2**63,)]
    assert len({key_of(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize(("share", "of"), [(0, 1000), (1, 1000), (500, 1000), (1000, 1000), (3, 1_000_000)])
def test_chosen_has_its_probability_exactly_at_the_edge(share: int, of: int) -> None:
    # The upper 32 bits u are chosen iff u / 2^32 < share / of.
    edge = share * 2**32 // of
    uppers = [u for u in (0, 1, edge - 1, edge, edge + 1, 2**32 - 1) if 0 <= u < 2**32]
    got = chosen(np.array([u << 32 | 0xFFFFFFFF for u in uppers], np.uint64), share, of)
    assert got.tolist() == [Fraction(u, 2**32) < Fraction(share, of) for u in uppers]


def test_fixed_point_logarithm_and_power() -> None:
    x = np.array([*range(1, 5000), 65535, 65536, 65537, 2**31 - 1])
    below = np.log2(x) * 2**FRACTION - log2(x)
    assert below.min() > -0.01  # float64's own rounding
    assert below.max() < 4  # 2^-30 in units of 2^-32
    assert log2(np.array([1, 2, 4096])).tolist() == [0, 1 << FRACTION, 12 << FRACTION]
    y = np.arange(16 << FRACTION, 30 << FRACTION, 123_456_789)
    exact = 2.0 ** (y / 2**FRACTION)
    assert (exp2(y) <= exact).all()
    assert (exp2(y) > exact * (1 - 2**-26) - 1).all()
    z = np.array([0, 1 << 31, 3 << 31, 8 << 32, 30 << 32, -(1 << 32), -(40 << 32)])
    assert exp2(z).tolist() == [1, 1, 2, 256, 2**30, 0, 0]


@pytest.mark.parametrize("exponent", [0, 500, 900, 2000])
def test_a_zipf_table_holds_each_rank_in_its_proportion(exponent: int) -> None:
    size = 200
    weights = [(k + 1) ** (-exponent / 1000) for k in range(size)]
    expected = np.array(weights) / sum(weights) * (1 << TABLE_BITS)
    found = np.bincount(zipf_table(size, exponent), minlength=size)
    assert found.sum() == 1 << TABLE_BITS
    assert np.abs(found - expected).max() < 1.5  # entries of 2^20


# --- the same bytes everywhere


def test_the_text_is_pinned() -> None:
    defaults = {"tail_milli": 1000}
    everything_on = {
        "vocabulary": 500,
        "zipf_milli": 1100,
        "order": 2,
        "branching": 40,
        "copy_permille": 30,
        "nesting": 6,
        "flip_ppm": 500,
        "burst_permille": 30,
        "duplicate_permille": 100,
        "alphabet_permille": 60,
        "tail_milli": 1500,
    }
    hashes = [hashlib.sha256("\0".join(made(**knobs)).encode()).hexdigest()[:16] for knobs in (defaults, everything_on)]
    assert synthetic.VERSION == 1
    assert hashes == ["b30ac5ac9d71582a", "0a62076043924e1e"], "the text changed: raise VERSION, pin the new hashes"


def test_the_size_is_exact_and_a_shorter_text_is_the_beginning_of_a_longer_one(clean: list[str]) -> None:
    assert sum(map(len, clean)) == SIZE
    assert "".join(clean).isascii()
    shorter = made(bytes=100_000)
    assert sum(map(len, shorter)) == 100_000
    assert shorter[:-1] == clean[: len(shorter) - 1]
    assert clean[len(shorter) - 1].startswith(shorter[-1])


def test_a_document_does_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tail_milli=1000, bytes=30_000)
    monkeypatch.setattr(synthetic, "BLOCK", 7)
    assert made(tail_milli=1000, bytes=30_000) == whole


def test_the_defaults_compress_like_web_text_and_take_a_second_per_megabyte_at_most() -> None:
    start = time.process_time()
    text = "".join(synthetic.documents(SyntheticConfig())).encode()
    assert time.process_time() - start < len(text) / 1e6
    ratio = len(lzma.compress(text)) / len(text)
    assert 0.27 < ratio < 0.33  # 0.294; 300 rows of C4: 0.327; the standard library's source: 0.19


# --- one knob, one mechanism


@pytest.mark.parametrize("exponent", [0, 700, 1300])
def test_zipf_is_the_exponent_of_the_word_frequencies(exponent: int) -> None:
    text = made(vocabulary=50, order=0, copy_permille=0, zipf_milli=exponent)[:-1]  # the last one ends inside a word
    counts = Counter(itertools.chain.from_iterable(map(words, text)))
    frequencies = sorted(counts.values(), reverse=True)
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(frequencies), 1)[0]
    assert len(frequencies) == 50
    assert abs(slope + exponent / 1000) < 0.1


def successors(documents: list[str], context: int) -> list[int]:
    """For each context of so many words, how many different words follow it."""
    following: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for document in documents[:-1]:
        said = words(document)
        for i in range(3, len(said)):  # the first words have less context
            following[tuple(said[i - context : i])].add(said[i])
    return [len(found) for found in following.values()]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_is_the_number_of_words_that_choose_the_next_among_branching(order: int) -> None:
    text = made(vocabulary=30, order=order, branching=3, zipf_milli=0, copy_permille=0)
    assert max(successors(text, order)) == 3  # that much context decides
    assert max(successors(text, order - 1)) > 3  # less does not


def test_order_zero_has_no_context() -> None:
    text = made(vocabulary=30, order=0, zipf_milli=0, copy_permille=0)
    assert min(successors(text, 1)) == 30


def repeated(documents: list[str], n: int = 6) -> float:
    """Share of the n-word stretches that stood before in the same document."""
    found = total = 0
    for document in documents:
        said, seen = words(document), set()
        for i in range(len(said) - n):
            stretch = tuple(said[i : i + n])
            found, total = found + (stretch in seen), total + 1
            seen.add(stretch)
    return found / total


def test_copy_repeats_stretches_of_the_same_document() -> None:
    shares = [repeated(made(copy_permille=share)) for share in (0, 10, 100)]
    assert shares[0] < 0.001 < 0.03 < shares[1] < 3 * shares[1] < shares[2]


@pytest.mark.parametrize("nesting", [0, 1, 4, 16])
def test_brackets_nest_as_deep_as_asked_and_always_close(nesting: int) -> None:
    closing, deepest = {")": "(", "]": "[", "}": "{", ">": "<"}, 0
    for document in made(nesting=nesting, bytes=SIZE)[:-1]:  # the last one is cut
        stack: list[str] = []
        for char in re.findall(r"[][(){}<>]", document):
            if char in closing:
                assert stack.pop() == closing[char]
            else:
                stack.append(char)
                deepest = max(deepest, len(stack))
        assert not stack
    assert deepest == nesting if nesting < 16 else 4 < deepest <= 16


def changed(before: list[str], after: list[str]) -> list[int]:
    assert [len(d) for d in before] == [len(d) for d in after]
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


@pytest.mark.parametrize("ppm", [1000, 50_000])
def test_flips_replace_single_bytes_and_nothing_else(clean: list[str], ppm: int) -> None:
    before, after = "".join(clean), "".join(made(flip_ppm=ppm))
    differing = sum(a != b for a, b in zip(before, after, strict=True))
    expected = SIZE * ppm / 1e6 * 127 / 128  # one random byte in 128 is the old one
    assert abs(differing - expected) < 5 * math.sqrt(expected)


def test_bursts_are_whole_documents_of_random_bytes(clean: list[str]) -> None:
    noisy = made(burst_permille=100)
    hit = changed(clean, noisy)
    assert 0.04 * len(clean) < len(hit) < 0.18 * len(clean)  # 10 % of 160 documents, 3 standard deviations
    counts = np.bincount(np.frombuffer("".join(noisy[i] for i in hit).encode(), np.uint8), minlength=256)
    assert counts[128:].sum() == 0
    share = counts[:128] / counts.sum()
    assert -(share * np.log2(share)).sum() > 6.95  # bits per byte, of 7


def test_alphabets_permute_the_letters_of_whole_documents(clean: list[str]) -> None:
    ciphered = made(alphabet_permille=300)
    hit = changed(clean, ciphered)
    assert 0.15 * len(clean) < len(hit) < 0.45 * len(clean)
    ciphers = set()
    for i in hit:
        cipher = dict(zip(clean[i], ciphered[i], strict=True))
        assert clean[i].translate(str.maketrans(cipher)) == ciphered[i]
        assert len(set(cipher.values())) == len(cipher)
        assert all(cipher[c] == c for c in cipher if not c.isalpha())
        ciphers.add(tuple(cipher.get(c) for c in "etao"))
    assert len(ciphers) > len(hit) / 2  # each document its own


def test_duplicates_repeat_an_earlier_document_whole(clean: list[str]) -> None:
    repeating = made(duplicate_permille=300)
    seen: set[str] = set()
    copies = 0
    for i, document in enumerate(repeating[:-1]):
        copies += document in seen
        assert document in seen or i >= len(clean) - 1 or document == clean[i]
        seen.add(document)
    assert 0.18 < copies / len(repeating) < 0.42
    assert len(set(clean)) == len(clean)


@pytest.mark.parametrize("tail", [0, 500, 1000])
def test_tail_is_the_spread_of_log2_of_the_length(tail: int) -> None:
    lengths = np.array([len(words(d)) for d in made(tail_milli=tail, bytes=1_500_000)[:-1]])
    assert np.std(np.log2(lengths)) == pytest.approx(tail / 1000, abs=0.06)
    assert np.median(lengths) == pytest.approx(256, rel=0.15)


def test_a_long_tail_stays_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 32)
    lengths = [len(words(d)) for d in made(tail_milli=10_000, bytes=400_000)[:-1]]
    assert min(lengths) == synthetic.SHORTEST
    assert max(lengths) == synthetic.LONGEST


@pytest.mark.parametrize("vocab", [2, 300])
def test_vocab_is_the_number_of_distinct_words(vocab: int) -> None:
    assert (
        len(set(itertools.chain.from_iterable(map(words, made(vocabulary=vocab, order=0, zipf_milli=0)[:-1])))) == vocab
    )
