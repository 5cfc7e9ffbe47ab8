"""Batches: a pure function of (seed, step), each window once per epoch, and an evaluation that nothing moves."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy.config import DataConfig, SyntheticConfig, TrainConfig, TrialConfig
from stabstudy.data.batches import BLOCKS, Batches, open_batches
from stabstudy.data.counter import permuted
from stabstudy.data.tokens import Corpus, prepare
from stabstudy.settings import DataError


def corpus(tokens: int, documents: int = 10) -> Corpus:
    """Token i has id i, so that a batch shows where it comes from; documents of about equal size."""
    ends = np.arange(1, documents + 1, dtype=np.uint64) * np.uint64(tokens) // np.uint64(documents)
    return Corpus(np.arange(tokens, dtype=np.uint32), ends, tokens, "f" * 16, Path("nowhere"))


def batches(tokens: int = 4001, **changes: Any) -> Batches:
    arguments: dict[str, Any] = {
        "seq_len": 10,
        "batch_size": 8,
        "seed": 0,
        "validation_share": 0.1,
        "eval_sequences": 16,
    }
    return Batches(corpus(tokens), **arguments | changes)


def epoch(b: Batches, steps: int) -> list[int]:
    return [w.index for step in range(steps) for w in b.windows(step)]


# --- the permutation


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(size: int, key: int) -> None:
    image = permuted(np.arange(size, dtype=np.uint64), size, np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_permutations_are_equally_likely(size: int) -> None:
    keys = 24_000
    image = permuted(
        np.tile(np.arange(size, dtype=np.uint64), keys), size, np.repeat(np.arange(keys, dtype=np.uint64), size)
    )
    counts = Counter(map(tuple, image.reshape(keys, size).tolist()))
    expected = keys / math.factorial(size)
    assert len(counts) == math.factorial(size)
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    degrees = math.factorial(size) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


def test_neighbours_are_scattered() -> None:
    size = 100_003
    image = permuted(np.arange(size, dtype=np.uint64), size, np.full(size, 42, np.uint64)).astype(np.int64)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.02


# --- training batches


def test_a_batch_is_stretches_of_the_corpus() -> None:
    b = batches()
    rows = b.batch(3)
    assert rows.shape == (8, 11) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    assert rows[:, 0].tolist() == [w.start for w in b.windows(3)]
    assert all(w.start == w.index * 10 for w in b.windows(3))


def test_every_training_window_once_per_epoch_then_in_another_order() -> None:
    b = batches(batch_size=1)
    n = b.training_windows
    one, two = (epoch(b, 2 * n)[k * n : (k + 1) * n] for k in range(2))
    assert len(set(one)) == n and set(one) == set(two)
    assert sum(a == c for a, c in zip(one, two, strict=True)) < 8  # a random order has one fixed point on average
    assert one != sorted(one)


@pytest.mark.parametrize("sizes", [(8, 16), (3, 12), (1, 7), (5, 200)])
def test_the_order_does_not_depend_on_the_batch_size(sizes: tuple[int, int]) -> None:
    small, large = (batches(batch_size=size) for size in sizes)
    steps = math.lcm(*sizes) * 3
    assert epoch(small, steps // sizes[0]) == epoch(large, steps // sizes[1])


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    first = epoch(batches(), 30)
    assert first == epoch(batches(), 30)
    assert first == epoch(batches(eval_sequences=3), 30)
    orders = [epoch(batches(seed=seed), 30) for seed in (0, 1, 2, 2**63 - 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_any_step_alone_is_what_it_is_in_the_run() -> None:
    run = batches()
    seen = {step: run.batch(step).tolist() for step in range(700)}  # more than one stretch computed ahead
    alone = batches()
    for step in (699, 0, 511, 512, 3, 699):
        assert alone.batch(step).tolist() == seen[step]
    assert batches().batch(10**9).shape == (8, 11)


def test_windows_name_the_documents_they_touch() -> None:
    b = Batches(corpus(4001, documents=137), 10, 8, 0, 0.1, 4)
    ends = b.corpus.doc_ends.tolist()
    for step in range(20):
        for window in b.windows(step):
            positions = range(window.start, window.start + 11)
            assert window.documents == tuple(sorted({next(d for d, e in enumerate(ends) if p < e) for p in positions}))


# --- the evaluation


@given(
    tokens=st.integers(300, 5000),
    seq_len=st.integers(1, 12),
    share=st.floats(0.02, 0.9),
    data=st.data(),
)
def test_training_and_validation_share_no_token(tokens: int, seq_len: int, share: float, data: st.DataObject) -> None:
    try:
        b = Batches(corpus(tokens), seq_len, 1, data.draw(st.integers(0, 9)), share, 1)
    except DataError:
        return  # so much is held out that nothing is left
    trained = set(itertools.chain.from_iterable(b.batch(step)[0].tolist() for step in range(b.training_windows)))
    held = Batches(corpus(tokens), seq_len, 1, 0, share, b.validation_windows).evaluation()
    assert len({row[0] for row in held.tolist()}) == b.validation_windows
    assert not trained & set(held.ravel().tolist())
    windows = (tokens - 1) // seq_len
    assert b.validation_windows == max(1, int(windows * share))
    assert windows - b.validation_windows - b.training_windows <= 2 * BLOCKS


def test_the_evaluation_depends_on_corpus_length_share_and_count_only() -> None:
    first = batches()
    for change in ({"seed": 7}, {"batch_size": 3}):
        assert np.array_equal(batches(**change).evaluation(), first.evaluation())
    hashes = {
        batches(**change).eval_hash
        for change in ({}, {"seq_len": 9}, {"validation_share": 0.2}, {"eval_sequences": 15}, {"tokens": 4100})
    }
    assert len(hashes) == 5
    body = first.evaluation().astype("<i8").tobytes()
    assert first.eval_hash == hashlib.sha256(body).hexdigest()[:16]


@pytest.mark.parametrize(("asked", "windows"), [(0, 16), (1, 16), (17, 17), (39, 39), (40, 40), (10**9, 40)])
def test_the_final_evaluation_is_as_large_as_asked_or_all_there_is(asked: int, windows: int) -> None:
    """40 windows are held out. Spread as the periodic one is, and the hash is of its tokens."""
    b = batches(final_sequences=asked)
    assert b.validation_windows == 40
    final, held = b.final_evaluation(), batches(eval_sequences=40).evaluation()
    assert final.shape == (windows, 11) and final.dtype == np.int64
    assert final[:, 0].tolist() == [held[i * 40 // windows, 0] for i in range(windows)]
    assert b.eval_hash == hashlib.sha256(final.astype("<i8").tobytes()).hexdigest()[:16]
    assert np.array_equal(b.evaluation(), batches().evaluation())  # the periodic one does not depend on it
    other = batches(final_sequences=asked, seed=7, batch_size=3)
    assert np.array_equal(other.final_evaluation(), final) and other.eval_hash == b.eval_hash
    assert (b.eval_hash == batches().eval_hash) == (windows == 16)


def test_a_trial_has_the_final_evaluation_of_its_settings(tmp_path: Path) -> None:
    data = DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=100_000), seq_len=64)

    def of(tokens: int, sequences: int = 32) -> Batches:
        train = TrainConfig(final_eval_tokens=tokens, eval_sequences=sequences)
        return open_batches(TrialConfig(data=data, train=train), tmp_path)

    assert len(of(64 * 40 + 1).final_evaluation()) == 41 and len(of(64 * 40 + 1).evaluation()) == 32
    assert len(of(64).final_evaluation()) == 32 and of(64).eval_hash == "c02df11ce8ac84ac"  # as before there was one
    assert len(of(16_384).final_evaluation()) == of(16_384).validation_windows == 78


def test_validation_is_a_few_contiguous_blocks_spread_over_the_corpus() -> None:
    b = batches(tokens=80_001, eval_sequences=800)
    held = b.evaluation()[:, 0] // 10
    blocks = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1)
    assert [len(block) for block in blocks] == [100] * BLOCKS
    assert [int(block[0]) // 1000 for block in blocks] == list(range(BLOCKS))  # one in each eighth
    few = batches(tokens=80_001, eval_sequences=16).evaluation()[:, 0] // 10
    assert set(few.tolist()) <= set(held.tolist())
    assert [int(w) // 1000 for w in few] == [i // 2 for i in range(16)]  # evenly from every block


def test_the_evaluation_and_the_order_are_pinned(tmp_path: Path) -> None:
    """Pinned: with another hash or order, the trials of older studies can no longer be compared with new ones."""
    text = prepare(DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=100_000)), tmp_path)
    b = Batches(text, 64, 8, 0, 0.05, 32)
    assert b.eval_hash == "c02df11ce8ac84ac"
    assert [w.index for w in b.windows(0)] == [531, 619, 201, 404, 1352, 1239, 1161, 1491]


# --- too small


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 10}, "data.seq_len: must be less than the 10 tokens of the data, got 10"),
        ({"tokens": 11}, "train.batch_size: must be at most 0, the training part of the data's 1 windows"),
        ({"batch_size": 400}, "train.batch_size: must be at most 344, the training part of the data's 400 windows"),
        ({"eval_sequences": 41}, "train.eval_sequences: must be at most 40, the validation part"),
        ({"validation_share": 0.999}, "train.batch_size: must be at most"),
    ],
)
def test_a_corpus_that_is_too_small_says_which_setting_and_how_much_there_is(
    changes: dict[str, int], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        batches(**changes)
    assert str(caught.value).startswith(said)
